// out = src + H diag(s) B^T (+ bias), and with the operands of the backward, dX = src + mask(dH A), for K adapters at once.
//
//   expand: out[m][o] = src[m][o] + bias[o] + sum over k of s_k * sum over j in adapter k of H[m][j] * B_k[o][j - begin_k]
//   dx:     out[m][i] = src[m][i] + sum over k of keep(k, m, i) / (1 - p) * sum over j in adapter k of dH[m][j] * A_k[j - begin_k][i]
//
// src may be missing (out is written only, and cuBLAS accumulates the base product onto it), be out itself, or another tensor.
//
// H100, M=8192, O=4096, bf16, R=32: writing Y is 67 MB, 22 us at 3.0 TB/s (45 us with src), against 2.1 GFLOP, 3 us of tensor
// cores: memory bound until R = 256. A block makes 128 x 128 outputs from 10 + 10 KB of shared memory; a lane keeps 16 sums
// and reads src a group ahead: 16 KB in flight a block, two blocks an SM (122 registers). The columns of the weight tile are permuted so that a
// lane's sums are eight consecutive outputs of a row: one 16-byte access, and one Philox call for its dropout bits.
#include "tile.cuh"

namespace tsugi {

constexpr int EXPAND_ROWS = 128;
constexpr int EXPAND_COLUMNS = 128;
constexpr int EXPAND_THREADS = 256;
// Columns of R held at once; beyond, they are read again for every 32 output columns.
constexpr int EXPAND_INNER = 64;
constexpr int EXPAND_INNER_64 = 32;

struct ExpandParams {
  const void* h;
  long long rows, columns, h_stride;
  const void* src;  // may be null
  long long src_stride;
  const void* bias;  // may be null
  void* out;
  long long out_stride;
  Adapters w;  // B_k [O, r_k], or A_k [r_k, I]
  Dropout dropout;
};

static_assert(sizeof(ExpandParams) == 1896, "src/cuda/params.rs says the same");

// The tile's row (or column) of weight n: within 32, output 8t + 2q + e is column 2t + e of the q-th 8-wide product.
TSUGI_DEVICE int expand_place(int n) { return (n & ~31) | (n >> 1 & 3) << 3 | (n >> 3 & 3) << 1 | (n & 1); }

template <class T, class P, bool TRANSPOSED>
TSUGI_DEVICE void lora_expand(const ExpandParams& p) {
  using Acc = typename Element<P>::Acc;
  DYNAMIC_SHARED(shared);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, g = lane_g(), t = lane_t();
  const int R = p.w.columns();
  const int inner = smaller((R + 15) / 16 * 16, sizeof(P) == 8 ? EXPAND_INNER_64 : EXPAND_INNER);
  const Padded<P> hs{shared, Padded<P>::pitch_of(inner)};
  const Padded<P> ws{shared + EXPAND_ROWS * hs.pitch, Padded<P>::pitch_of(TRANSPOSED ? EXPAND_COLUMNS : inner)};

  const long long column_tiles = (p.columns + EXPAND_COLUMNS - 1) / EXPAND_COLUMNS;
  const long long row0 = blockIdx.x / column_tiles * EXPAND_ROWS, column0 = blockIdx.x % column_tiles * EXPAND_COLUMNS;
  const P* h = static_cast<const P*>(p.h);
  const T* src = static_cast<const T*>(p.src);
  T* out = static_cast<T*>(p.out);
  const bool h_aligned = aligned_rows(h, p.h_stride), src_aligned = aligned_rows(src, p.src_stride);
  const bool out_aligned = aligned_rows(out, p.out_stride);
  const DropoutState drop(p.dropout);

  auto load_tiles = [&](int r0) {
    constexpr int PER = 16 / sizeof(P);
    const int h_row = inner / PER;
    for (int c = tid; c < EXPAND_ROWS * h_row; c += EXPAND_THREADS) {
      const int r = c / h_row, j = c % h_row * PER;
      stage_chunk(hs.chunk(r, j), h + (row0 + r) * p.h_stride + r0 + j, row0 + r < p.rows ? R - r0 - j : 0, h_aligned);
    }
    cp_async_commit();
    if constexpr (TRANSPOSED) {
      constexpr int EIGHTS = EXPAND_COLUMNS / 8;
      for (int c = tid; c < inner * EIGHTS; c += EXPAND_THREADS) {
        const int j = c / EIGHTS, n = c % EIGHTS * 8;
        Eight<P> v{};
        if (r0 + j < R) {
          const int k = p.w.of(r0 + j);
          const P* row = static_cast<const P*>(p.w.ptr[k]) + (r0 + j - p.w.begin[k]) * p.w.stride[k];
          v = load_eight(row + column0 + n, p.columns - column0 - n, (reinterpret_cast<uintptr_t>(row) & 15) == 0);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) *static_cast<P*>(ws.chunk(j, expand_place(n + i))) = Element<P>::from(get_element(v, i));
      }
    } else {
      const int eights = inner / 8;
      for (int c = tid; c < EXPAND_COLUMNS * eights; c += EXPAND_THREADS) {
        const int n = c / eights, j = c % eights * 8;
        Eight<P> v{};
        if (column0 + n < p.columns && r0 + j < R) {
          const int k = p.w.of(r0 + j);
          const P* row = static_cast<const P*>(p.w.ptr[k]) + (column0 + n) * p.w.stride[k] + (r0 + j - p.w.begin[k]);
          if (r0 + j + 8 <= p.w.begin[k + 1]) {
            v = load_eight(row, 8, (reinterpret_cast<uintptr_t>(row) & 15) == 0);
          } else {
            Acc one[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int column = r0 + j + i;
              one[i] = Acc(0);
              if (column < R) {
                const int ki = p.w.of(column);
                one[i] = widen(static_cast<const P*>(p.w.ptr[ki])[(column0 + n) * p.w.stride[ki] + (column - p.w.begin[ki])]);
              }
            }
            v = pack_eight<P>(one);
          }
        }
        store_eight(static_cast<P*>(ws.chunk(expand_place(n), j)), v, 8, true);
      }
    }
    cp_async_wait<0>();
  };

  const bool one_pass = R <= inner;
  const long long row_g = row0 + warp * 16 + g;
  auto load_src = [&](int q, int half) {
    const long long row = row_g + 8 * half, column = column0 + 32 * q + 8 * t;
    const long long valid = src && row < p.rows ? p.columns - column : 0;
    return load_eight(src + row * p.src_stride + column, valid, src_aligned);
  };
  Eight<T> next[2] = {load_src(0, 0), load_src(0, 1)};
  if (one_pass) {
    load_tiles(0);
    __syncthreads();
  }

  for (int q = 0; q < EXPAND_COLUMNS / 32; ++q) {
    const Eight<T> now[2] = {next[0], next[1]};
    if (q + 1 < EXPAND_COLUMNS / 32) {
      next[0] = load_src(q + 1, 0);
      next[1] = load_src(q + 1, 1);
    }
    const long long column = column0 + 32 * q + 8 * t;
    Acc sum[4][4] = {};
    for (int r0 = 0; r0 < R; r0 += inner) {
      if (!one_pass) {
        __syncthreads();
        load_tiles(r0);
        __syncthreads();
      }
      const int r1 = smaller(r0 + inner, R);
      for (int k = p.w.of(r0); k < p.w.count && p.w.begin[k] < r1; ++k) {
        // This adapter's columns within the tile. Steps of 16 that reach beyond them are masked.
        const int begin = larger(p.w.begin[k] - r0, 0), end = smaller(p.w.begin[k + 1], r1) - r0;
        Acc part[4][4] = {};
        for (int j = begin / 16 * 16; j < end; j += 16) {
          Left<P> left;
          load_left(left, hs, warp * 16, j);
          if (j < begin || j + 16 > end) {
            uint32_t inside = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int at = j + lane_k(i);
              if (at >= begin && at < end) inside |= 17u << i;
            }
            mask_left(left, inside);
          }
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            Right<P> right[2];
            if constexpr (TRANSPOSED) {
              load_right_pair_transposed(right[0], right[1], ws, j, 32 * q + 16 * pair);
            } else {
              load_right_pair(right[0], right[1], ws, 32 * q + 16 * pair, j);
            }
            multiply(part[2 * pair], left, right[0]);
            multiply(part[2 * pair + 1], left, right[1]);
          }
        }
        const Acc scale = static_cast<Acc>(p.w.scale[k] * p.dropout.factor);
        uint32_t keep = 0xffffu;
        if (drop.threshold) keep = drop.keep(k, row_g, column / 8) | drop.keep(k, row_g + 8, column / 8) << 8;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool kept = keep >> (8 * (i >> 1) + 2 * n + (i & 1)) & 1u;
            sum[n][i] += kept ? part[n][i] * scale : Acc(0);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long long row = row_g + 8 * half, valid = p.columns - column;
      if (row >= p.rows || valid <= 0) continue;
      Acc v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = static_cast<Acc>(get_element(now[half], i)) + sum[i >> 1][2 * half + (i & 1)];
      if (p.bias) {
        const Eight<T> bias = load_eight(static_cast<const T*>(p.bias) + column, valid, (reinterpret_cast<uintptr_t>(p.bias) & 15) == 0);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += static_cast<Acc>(get_element(bias, i));
      }
      store_eight(out + row * p.out_stride + column, pack_eight<T>(v), valid, out_aligned);
    }
  }
}

}  // namespace tsugi

#define TSUGI_KERNEL(T, P)                                                             \
  extern "C" __global__ void __launch_bounds__(tsugi::EXPAND_THREADS, sizeof(tsugi::P) == 8 ? 1 : 2)              \
      tsugi_lora_expand_##T##_##P(const __grid_constant__ tsugi::ExpandParams p) {     \
    tsugi::lora_expand<tsugi::T, tsugi::P, false>(p);                                  \
  }                                                                                    \
  extern "C" __global__ void __launch_bounds__(tsugi::EXPAND_THREADS, sizeof(tsugi::P) == 8 ? 1 : 2)              \
      tsugi_lora_dx_##T##_##P(const __grid_constant__ tsugi::ExpandParams p) {         \
    tsugi::lora_expand<tsugi::T, tsugi::P, true>(p);                                   \
  }
TSUGI_KERNEL(bf16, bf16)
TSUGI_KERNEL(f16, f16)
TSUGI_KERNEL(bf16, f32)
TSUGI_KERNEL(f16, f32)
TSUGI_KERNEL(f32, f32)
TSUGI_KERNEL(f64, f64)
#undef TSUGI_KERNEL
