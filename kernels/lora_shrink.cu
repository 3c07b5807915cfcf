// H = drop(X) A^T for K adapters side by side: X [M, I] is read once, H [M, R] is written.
//
//   for m in rows, j in columns of R, k = adapter of column j:
//     H[m][j] = sum over i of X[m][i] * keep(k, m, i) / (1 - p) * A_k[j - begin_k][i]
//
// H100, M=8192, I=4096, bf16, R=32: X is 67 MB and 2.1 GFLOP, so 22 us at 3.0 TB/s and 3 us of tensor cores; A (262 KB)
// stays in L2 and adds a quarter of X's traffic there. A block takes 128 rows: 64 row tiles, times 4 splits along I, are
// 256 blocks, two an SM, each with 3 of 4 stages of 20 KB in flight: 120 KB an SM, where 3.0 TB/s at 800 ns needs 18 KB
// (132 SMs), so the splits are there to fill SMs, not for latency. Split sums: 4 MB, added in order by lora_reduce.
// Dropout: one Philox call gives a lane its eight columns of a row: no shuffle, no masked copy; 60 instructions for eight
// elements and adapter, 17 us of issue slots a pair of adapters, beside 22 us of memory.
#include "tile.cuh"

namespace tsugi {

constexpr int SHRINK_ROWS = 128;
constexpr int SHRINK_THREADS = 256;
constexpr int SHRINK_STAGES_16 = 4;
constexpr int SHRINK_STAGES_32 = 3;
constexpr int SHRINK_STAGES_64 = 2;

struct ShrinkParams {
  const void* x;
  long long rows, inner, x_stride;
  void* h;  // with one split, where factor must also be applied; else unused
  long long h_stride;
  void* partial;  // with more: [splits][rows][R] in the accumulator's type
  int splits;
  Adapters a;  // A_k [r_k, I]
  Dropout dropout;
};

static_assert(sizeof(ShrinkParams) == 1888, "src/cuda/params.rs says the same");

template <class T, class P, int RT>
struct ShrinkShape {
  static constexpr int COLUMNS = sizeof(T) == 2 ? 64 : 32;
  static constexpr int STAGES = sizeof(P) == 2 ? SHRINK_STAGES_16 : sizeof(P) == 4 ? SHRINK_STAGES_32 : SHRINK_STAGES_64;
  static constexpr int X_BYTES = SHRINK_ROWS * COLUMNS * static_cast<int>(sizeof(T));
  static constexpr int STAGE_BYTES = X_BYTES + RT * COLUMNS * static_cast<int>(sizeof(P));
  static constexpr int SHARED = STAGES * STAGE_BYTES;
};

template <class T, class P, int RT>
TSUGI_DEVICE void lora_shrink(const ShrinkParams& p) {
  using Shape = ShrinkShape<T, P, RT>;
  using Acc = typename Element<P>::Acc;
  constexpr int COLUMNS = Shape::COLUMNS, STAGES = Shape::STAGES, NT = RT / 8;
  constexpr int STAGE_BYTES = Shape::STAGE_BYTES;
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, adapter_of, RT);
  SHARED_ARRAY(const P*, row_of, RT);

  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, g = lane_g(), t = lane_t();
  const int R = p.a.columns(), column0 = static_cast<int>(blockIdx.y) * RT;
  const long long row0 = static_cast<long long>(blockIdx.x) * SHRINK_ROWS;
  for (int j = tid; j < RT; j += SHRINK_THREADS) {
    const int column = smaller(column0 + j, R - 1), k = p.a.of(column);
    adapter_of[j] = k;
    row_of[j] = column0 + j < R ? static_cast<const P*>(p.a.ptr[k]) + (column - p.a.begin[k]) * p.a.stride[k] : nullptr;
  }
  const long long chunks = (p.inner + COLUMNS - 1) / COLUMNS;
  const long long per_split = (chunks + p.splits - 1) / p.splits;
  const long long first = static_cast<long long>(blockIdx.z) * per_split, last = smaller(first + per_split, chunks);
  const T* x = static_cast<const T*>(p.x);
  const bool x_aligned = aligned_rows(x, p.x_stride);
  __syncthreads();

  auto stage = [&](long long chunk) {
    const int slot = static_cast<int>((chunk - first) % STAGES);
    const Swizzled<T> xs{shared + slot * STAGE_BYTES, COLUMNS * static_cast<int>(sizeof(T))};
    const Swizzled<P> as{shared + slot * STAGE_BYTES + Shape::X_BYTES, COLUMNS * static_cast<int>(sizeof(P))};
    const long long at = chunk * COLUMNS;
    constexpr int PER_X = 16 / sizeof(T), PER_A = 16 / sizeof(P);
    constexpr int X_ROW = COLUMNS / PER_X, A_ROW = COLUMNS / PER_A;
    for (int c = tid; c < SHRINK_ROWS * X_ROW; c += SHRINK_THREADS) {
      const int r = c / X_ROW, i = c % X_ROW * PER_X;
      const long long valid = row0 + r < p.rows ? p.inner - at - i : 0;
      stage_chunk(xs.chunk(r, i), x + (row0 + r) * p.x_stride + at + i, valid, x_aligned);
    }
    for (int c = tid; c < RT * A_ROW; c += SHRINK_THREADS) {
      const int r = c / A_ROW, i = c % A_ROW * PER_A;
      const P* row = row_of[r];
      stage_chunk(as.chunk(r, i), row + at + i, row ? p.inner - at - i : 0, (reinterpret_cast<uintptr_t>(row) & 15) == 0);
    }
  };

  Acc acc[NT][4] = {};
  const DropoutState drop(p.dropout);
  const int adapter_first = adapter_of[0], adapter_last = adapter_of[RT - 1];
  for (int s = 0; s < STAGES - 1; ++s) {
    if (first + s < last) stage(first + s);
    cp_async_commit();
  }
  for (long long chunk = first; chunk < last; ++chunk) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (chunk + STAGES - 1 < last) stage(chunk + STAGES - 1);
    cp_async_commit();
    const int slot = static_cast<int>((chunk - first) % STAGES);
    const Swizzled<T> xs{shared + slot * STAGE_BYTES, COLUMNS * static_cast<int>(sizeof(T))};
    const Swizzled<P> as{shared + slot * STAGE_BYTES + Shape::X_BYTES, COLUMNS * static_cast<int>(sizeof(P))};
#pragma unroll
    for (int k0 = 0; k0 < COLUMNS; k0 += 32) {
      const Eight<T> low = load_wide(xs, warp * 16 + g, k0 + 8 * t), high = load_wide(xs, warp * 16 + 8 + g, k0 + 8 * t);
      if (drop.threshold == 0) {
        Left<T> left[2];
        left_of_wide(left[0], low, high, 0);
        left_of_wide(left[1], low, high, 1);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const Eight<P> wide = load_wide(as, n * 8 + g, k0 + 8 * t);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            Right<P> right;
            right_of_wide(right, wide, s);
            multiply(acc[n], left[s], right);
          }
        }
      } else {
        const long long group = (chunk * COLUMNS + k0) / 8 + t, row = row0 + warp * 16 + g;
        for (int k = adapter_first; k <= adapter_last; ++k) {
          const uint32_t keep_low = drop.keep(k, row, group), keep_high = drop.keep(k, row + 8, group);
          Left<T> left[2];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            left_of_wide(left[s], low, high, s);
            mask_left(left[s], wide_mask(keep_low, keep_high, s));
          }
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            if (adapter_of[n * 8] > k || adapter_of[n * 8 + 7] < k) continue;
            const Eight<P> wide = load_wide(as, n * 8 + g, k0 + 8 * t);
            const bool mine = adapter_of[n * 8 + g] == k;
#pragma unroll
            for (int s = 0; s < 2; ++s) {
              Right<P> right;
              right_of_wide(right, wide, s);
              if (!mine) clear_right(right);
              multiply(acc[n], left[s], right);
            }
          }
        }
      }
    }
  }
  cp_async_wait<0>();

  const Acc factor = static_cast<Acc>(p.dropout.factor);
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long row = row0 + warp * 16 + g + 8 * (i >> 1);
      const int column = column0 + n * 8 + 2 * t + (i & 1);
      if (row >= p.rows || column >= R) continue;
      if (p.splits == 1) {
        static_cast<P*>(p.h)[row * p.h_stride + column] = Element<P>::from(acc[n][i] * factor);
      } else {
        static_cast<Acc*>(p.partial)[(static_cast<long long>(blockIdx.z) * p.rows + row) * R + column] = acc[n][i];
      }
    }
  }
}

}  // namespace tsugi

#define TSUGI_KERNEL(T, P, RT)                                                                       \
  extern "C" __global__ void __launch_bounds__(tsugi::SHRINK_THREADS, sizeof(tsugi::P) == 2 ? 2 : 1) \
      tsugi_lora_shrink_##T##_##P##_r##RT(const __grid_constant__ tsugi::ShrinkParams p) {           \
    tsugi::lora_shrink<tsugi::T, tsugi::P, RT>(p);                                                   \
  }
TSUGI_EACH_LOW_RANK(TSUGI_KERNEL)
#undef TSUGI_KERNEL
