// The trigger's statistic from S and the scalars, left on the device.
//
//   norm2 = sum S[i]^2;   out = (m, n, Q, norm2, V, P, numel, nonfinite)
//   V = max(0, (Q - norm2 / n) / (n - n2 / n)), +inf where m < 2;   P = norm2 / n^2, 0 where n = 0
//
// `norm` leaves one fp64 sum a block, `finish` adds them in order: two launches, the second of one block.
// H100, 42 M elements: S is 168 MB, 56 us at 3.0 TB/s. Squares and sums in fp64: at 42 M conversions and as many FMAs, 12 us of
// a data-centre GPU's fp64 units, hidden behind memory, and V stays exact to 1e-12 where the signal is 1e3 times the noise.
#include "tensor_table.cuh"

namespace tsugi {

constexpr int STATS_THREADS = 256;

struct StatsParams {
  TensorTable table;
  double* norms;  // one a block
  int first_block;
};

struct StatsFinishParams {
  const double* stats;
  const double* norms;
  int blocks;
  double numel;
  double* out;
};

static_assert(sizeof(StatsParams) == 16416 && sizeof(StatsFinishParams) == 40, "src/cuda/params.rs says the same");

TSUGI_DEVICE void sideband_norm(const StatsParams& p) {
  SHARED_ARRAY(double, scratch, TABLE_THREADS / 32);
  double squares = 0;
  each_eight(p.table, [&](int tensor, long long at, long long valid) {
    const float* sum = static_cast<const float*>(p.table.sum[tensor]);
    const Eight<float> s = load_eight(sum + at, valid, aligned_pointer(sum));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double v = static_cast<double>(get_element(s, i));
      squares += v * v;
    }
  });
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) p.norms[p.first_block + static_cast<int>(blockIdx.x)] = squares;
}

TSUGI_DEVICE void sideband_finish(const StatsFinishParams& p) {
  SHARED_ARRAY(double, scratch, STATS_THREADS / 32);
  double norm2 = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.blocks; i += STATS_THREADS) norm2 += p.norms[i];
  norm2 = block_sum(norm2, scratch);
  if (threadIdx.x != 0) return;
  const double m = p.stats[STATS_M], n = p.stats[STATS_N], n2 = p.stats[STATS_N2], q = p.stats[STATS_Q];
  const double infinity = static_cast<double>(bits_float(0x7f800000u));
  p.out[0] = m;
  p.out[1] = n;
  p.out[2] = q;
  p.out[3] = norm2;
  const double degrees = n - n2 / n, variance = (q - norm2 / n) / degrees;
  p.out[4] = !(m >= 2 && degrees > 0) ? infinity : variance < 0 ? 0.0 : variance;  // NaN stays NaN
  p.out[5] = n > 0 ? norm2 / (n * n) : 0.0;
  p.out[6] = p.numel;
  p.out[7] = p.stats[STATS_NONFINITE];
}

}  // namespace tsugi

extern "C" __global__ void __launch_bounds__(tsugi::TABLE_THREADS, 4) tsugi_sideband_norm(const __grid_constant__ tsugi::StatsParams p) {
  tsugi::sideband_norm(p);
}
extern "C" __global__ void __launch_bounds__(tsugi::STATS_THREADS) tsugi_sideband_finish(const __grid_constant__ tsugi::StatsFinishParams p) {
  tsugi::sideband_finish(p);
}
