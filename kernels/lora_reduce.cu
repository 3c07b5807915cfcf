// The second stage of every split sum: adds partial results in a fixed order, scales them and hands them to the adapters.
//
//   e = (row, column):  out = factor * scale_k * sum over s = 0 .. splits-1 of partial[s][row][column],  k = adapter
//
// The adapters lie side by side along the columns (H, dH, dB) or along the rows (dA). Up to two such jobs a launch
// (dH and dB come from the same pass), one along grid.y each.
//
// H100, dY pass of M=8192, O=4096, R=32: 8 copies of dH (8.4 MB) and 16 of dB (8.4 MB), mostly still in L2: 6 us from memory,
// under 4 us from L2. One thread an element, neighbours along the columns, no shared memory, full occupancy.
#include "common.cuh"

namespace tsugi {

constexpr int REDUCE_THREADS = 256;

struct ReduceJob {
  const void* partial;
  long long rows, columns;
  double factor;
  int splits;
  int adapters_along_rows;
};

struct ReduceParams {
  ReduceJob job[2];
  Adapters out[2];  // scale_k; ptr and stride of the rows of adapter k
};

static_assert(sizeof(ReduceParams) == 3680, "src/cuda/params.rs says the same");

template <class P>
TSUGI_DEVICE void lora_reduce(const ReduceParams& p) {
  using Acc = typename Element<P>::Acc;
  const ReduceJob& job = p.job[blockIdx.y];
  const Adapters& out = p.out[blockIdx.y];
  const long long size = job.rows * job.columns;
  const Acc* partial = static_cast<const Acc*>(job.partial);
  for (long long e = static_cast<long long>(blockIdx.x) * REDUCE_THREADS + threadIdx.x; e < size;
       e += static_cast<long long>(gridDim.x) * REDUCE_THREADS) {
    Acc sum = 0;
    for (int s = 0; s < job.splits; ++s) sum += partial[s * size + e];
    const long long row = e / job.columns, column = e % job.columns;
    const long long r = job.adapters_along_rows ? row : column;
    const int k = out.of(static_cast<int>(r));
    const long long within = r - out.begin[k];
    const long long at = job.adapters_along_rows ? within * out.stride[k] + column : row * out.stride[k] + within;
    static_cast<P*>(out.ptr[k])[at] = Element<P>::from(sum * static_cast<Acc>(job.factor * out.scale[k]));
  }
}

}  // namespace tsugi

#define TSUGI_KERNEL(P)                                                             \
  extern "C" __global__ void __launch_bounds__(tsugi::REDUCE_THREADS)               \
      tsugi_lora_reduce_##P(const __grid_constant__ tsugi::ReduceParams p) {        \
    tsugi::lora_reduce<tsugi::P>(p);                                                \
  }
TSUGI_KERNEL(bf16)
TSUGI_KERNEL(f16)
TSUGI_KERNEL(f32)
TSUGI_KERNEL(f64)
#undef TSUGI_KERNEL
