// S += w g for every tensor of an adapter, with the scalars of the trigger, unless a gradient is not finite.
//
//   finite = every g[i] is finite
//   finite:  S[i] += w g[i];  m += 1;  n += w;  n2 += w^2;  Q += w sum g[i]^2          else:  nonfinite += 1 and nothing more
//   zero_grad: g[i] = 0 either way
//
// Two launches and no host: `inspect` leaves one sum of squares and one flag a block, `accumulate` reads the flags first (2 KB,
// from L2), and its block 0 adds the sums in order and writes the scalars. Every block looks at all flags, so that no block has
// to wait for another, and the grid needs no cooperation, no counter and nothing zeroed beforehand.
//
// H100, r=16 on every linear of Llama-3-8B, 42 M elements, bf16: g 84 MB read twice, S 168 MB read and written: 504 MB, 168 us
// at 3.0 TB/s, where one pass over g would be 420 MB and 140 us. Up to some 20 M elements g is still in L2 (50 MB) at the second
// read: 10 B an element. 8 elements a thread, 16-byte accesses, 2 chunks' halves in flight; 2 x 264 blocks of 256 threads.
#include "tensor_table.cuh"

namespace tsugi {

struct AccumulateParams {
  TensorTable table;
  double* stats;
  double* squares;  // one a block of `inspect`
  int* flags;       // likewise; not 0 where a block met a value that is not finite
  int blocks;       // of all launches of `inspect` together
  int first_block;  // this launch's first among them
  double weight;
  int zero_grad;
  int update_stats;  // the last launch of several
};

static_assert(sizeof(AccumulateParams) == 16448, "src/cuda/params.rs says the same");

template <class T>
TSUGI_DEVICE void sideband_inspect(const AccumulateParams& p) {
  SHARED_ARRAY(double, scratch, TABLE_THREADS / 32);
  SHARED_ARRAY(int, bad, TABLE_THREADS / 32);
  double squares = 0;
  bool finite = true;
  each_eight(p.table, [&](int tensor, long long at, long long valid) {
    const T* grad = static_cast<const T*>(p.table.grad[tensor]);
    const Eight<T> g = load_eight(grad + at, valid, aligned_pointer(grad));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = static_cast<float>(get_element(g, i));  // as S will hold it
      finite = finite && (float_bits(v) & 0x7f800000u) != 0x7f800000u;
      squares += static_cast<double>(v) * static_cast<double>(v);
    }
  });
  const unsigned votes = __ballot_sync(0xffffffffu, !finite);
  if (threadIdx.x % 32 == 0) bad[threadIdx.x / 32] = votes != 0;
  squares = block_sum(squares, scratch);  // with a barrier
  if (threadIdx.x == 0) {
    int flag = 0;
    for (int i = 0; i < TABLE_THREADS / 32; ++i) flag |= bad[i];
    p.squares[p.first_block + static_cast<int>(blockIdx.x)] = squares;
    p.flags[p.first_block + static_cast<int>(blockIdx.x)] = flag;
  }
}

template <class T>
TSUGI_DEVICE void sideband_accumulate(const AccumulateParams& p) {
  SHARED_ARRAY(int, bad, TABLE_THREADS / 32);
  int mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.blocks; i += TABLE_THREADS) mine |= p.flags[i];
  const unsigned votes = __ballot_sync(0xffffffffu, mine != 0);
  if (threadIdx.x % 32 == 0) bad[threadIdx.x / 32] = votes != 0;
  __syncthreads();
  bool finite = true;
  for (int i = 0; i < TABLE_THREADS / 32; ++i) finite = finite && !bad[i];

  if (blockIdx.x == 0 && threadIdx.x == 0 && p.update_stats) {
    if (finite) {
      double q = 0;
      for (int i = 0; i < p.blocks; ++i) q += p.squares[i];
      p.stats[STATS_M] += 1.0;
      p.stats[STATS_N] += p.weight;
      p.stats[STATS_N2] += p.weight * p.weight;
      p.stats[STATS_Q] += p.weight * q;
    } else {
      p.stats[STATS_NONFINITE] += 1.0;
    }
  }
  if (!finite && !p.zero_grad) return;
  const float weight = static_cast<float>(p.weight);
  each_eight(p.table, [&](int tensor, long long at, long long valid) {
    T* grad = static_cast<T*>(p.table.grad[tensor]);
    float* sum = static_cast<float*>(p.table.sum[tensor]);
    const bool grad_aligned = aligned_pointer(grad), sum_aligned = aligned_pointer(sum);
    if (finite) {
      const Eight<T> g = load_eight(grad + at, valid, grad_aligned);
      const Eight<float> s = load_eight(sum + at, valid, sum_aligned);
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = get_element(s, i) + weight * static_cast<float>(get_element(g, i));
      store_eight(sum + at, pack_eight<float>(v), valid, sum_aligned);
    }
    if (p.zero_grad) store_eight(grad + at, Eight<T>{}, valid, grad_aligned);
  });
}

}  // namespace tsugi

#define TSUGI_KERNEL(T)                                                                \
  extern "C" __global__ void __launch_bounds__(tsugi::TABLE_THREADS, 4)                \
      tsugi_sideband_inspect_##T(const __grid_constant__ tsugi::AccumulateParams p) {  \
    tsugi::sideband_inspect<tsugi::T>(p);                                              \
  }                                                                                    \
  extern "C" __global__ void __launch_bounds__(tsugi::TABLE_THREADS, 4)                \
      tsugi_sideband_accumulate_##T(const __grid_constant__ tsugi::AccumulateParams p) {\
    tsugi::sideband_accumulate<tsugi::T>(p);                                           \
  }
TSUGI_KERNEL(bf16)
TSUGI_KERNEL(f16)
TSUGI_KERNEL(f32)
TSUGI_KERNEL(f64)
#undef TSUGI_KERNEL
