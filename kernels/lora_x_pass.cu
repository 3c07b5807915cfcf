// dA = dH^T drop(X) for K adapters at once: one read of X [M, I].
//
//   dA_k[j - begin_k][i] = sum over m of dH[m][j] * X[m][i] * keep(k, m, i) / (1 - p)
//
// A block takes 128 columns of X and a range of rows, and leaves partial[split][j][i]; lora_reduce adds the splits in order.
//
// H100, M=8192, I=4096, bf16, R=32: X is 67 MB, 22 us at 3.0 TB/s; 2.1 GFLOP, 3 us. 32 column strips times 8 splits are 256
// blocks, two an SM at least (45 KB, 90 registers), each with 3 stages of 11 KB in flight. dH (0.5 MB) is read again by every strip, from L2: a quarter of
// X's traffic. Partials: 8 x 0.5 MB, 6% of X. Shared memory reads: X once, dH eight times a stage (every warp): 3x of X.
// Dropout: a lane draws one Philox word for 8 columns of one row; five shuffles hand a 16 x 16 fragment its bits.
#include "tile.cuh"

namespace tsugi {

constexpr int XPASS_COLUMNS = 128;
constexpr int XPASS_THREADS = 256;
constexpr int XPASS_STAGES = 4;
constexpr int XPASS_ROWS_16 = 32;
constexpr int XPASS_ROWS_32 = 16;

struct XPassParams {
  const void* x;
  long long rows, columns, x_stride;
  const void* dh;
  long long dh_stride;
  void* partial;              // [splits][R][columns]
  long long rows_per_split;
  Adapters a;                 // begin and count alone
  Dropout dropout;
};

static_assert(sizeof(XPassParams) == 1888, "src/cuda/params.rs says the same");

template <class T, class P, int RT>
struct XPassShape {
  static constexpr int ROWS = sizeof(P) == 2 ? XPASS_ROWS_16 : XPASS_ROWS_32;
  static constexpr int X_PITCH = Padded<T>::pitch_of(XPASS_COLUMNS), H_PITCH = Padded<P>::pitch_of(RT);
  static constexpr int STAGE_BYTES = ROWS * (X_PITCH + H_PITCH);
  static constexpr int SHARED = XPASS_STAGES * STAGE_BYTES;
};

template <class T, class P, int RT>
TSUGI_DEVICE void lora_x_pass(const XPassParams& p) {
  using Shape = XPassShape<T, P, RT>;
  using Acc = typename Element<P>::Acc;
  constexpr int ROWS = Shape::ROWS, STAGES = XPASS_STAGES, NT = RT / 8;
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, adapter_of, RT);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, g = lane_g(), t = lane_t();
  const int R = p.a.columns(), r0 = static_cast<int>(blockIdx.y) * RT;
  const long long column0 = static_cast<long long>(blockIdx.x) * XPASS_COLUMNS;
  const long long first = static_cast<long long>(blockIdx.z) * p.rows_per_split, last = smaller(first + p.rows_per_split, p.rows);
  const T* x = static_cast<const T*>(p.x);
  const P* dh = static_cast<const P*>(p.dh);
  const bool x_aligned = aligned_rows(x, p.x_stride), h_aligned = aligned_rows(dh, p.dh_stride);
  for (int j = tid; j < RT; j += XPASS_THREADS) adapter_of[j] = p.a.of(smaller(r0 + j, R - 1));

  auto tiles = [&](int slot, Padded<T>& xs, Padded<P>& hs) {
    xs = {shared + slot * Shape::STAGE_BYTES, Shape::X_PITCH};
    hs = {shared + slot * Shape::STAGE_BYTES + ROWS * Shape::X_PITCH, Shape::H_PITCH};
  };
  auto stage = [&](long long row0, int slot) {
    Padded<T> xs;
    Padded<P> hs;
    tiles(slot, xs, hs);
    constexpr int PER_X = 16 / sizeof(T), PER_H = 16 / sizeof(P);
    constexpr int X_ROW = XPASS_COLUMNS / PER_X, H_ROW = RT / PER_H;
    for (int c = tid; c < ROWS * X_ROW; c += XPASS_THREADS) {
      const int r = c / X_ROW, i = c % X_ROW * PER_X;
      const long long valid = row0 + r < last ? p.columns - column0 - i : 0;
      stage_chunk(xs.chunk(r, i), x + (row0 + r) * p.x_stride + column0 + i, valid, x_aligned);
    }
    for (int c = tid; c < ROWS * H_ROW; c += XPASS_THREADS) {
      const int r = c / H_ROW, j = c % H_ROW * PER_H;
      stage_chunk(hs.chunk(r, j), dh + (row0 + r) * p.dh_stride + r0 + j, row0 + r < last ? R - r0 - j : 0, h_aligned);
    }
  };

  Acc acc[NT][4] = {};
  const DropoutState drop(p.dropout);
  const long long steps = last > first ? (last - first + ROWS - 1) / ROWS : 0;
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) stage(first + s * ROWS, s);
    cp_async_commit();
  }
  __syncthreads();
  const int adapter_first = adapter_of[0], adapter_last = adapter_of[RT - 1];
  for (long long step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) stage(first + (step + STAGES - 1) * ROWS, static_cast<int>((step + STAGES - 1) % STAGES));
    cp_async_commit();
    Padded<T> xs;
    Padded<P> hs;
    tiles(static_cast<int>(step % STAGES), xs, hs);
#pragma unroll 2
    for (int k0 = 0; k0 < ROWS; k0 += 16) {
      Left<T> left;
      load_left_transposed(left, xs, k0, warp * 16);
      if (drop.threshold == 0) {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          Right<P> right[2];
          load_right_pair_transposed(right[0], right[1], hs, k0, n * 8);
          multiply(acc[n], left, right[0]);
          multiply(acc[n + 1], left, right[1]);
        }
      } else {
        const long long row = first + step * ROWS + k0 + lane % 16, group = column0 / 8 + warp * 2 + lane / 16;
        for (int k = adapter_first; k <= adapter_last; ++k) {
          // Lanes 0..15 now know both column groups of one row each; every lane collects its four rows.
          uint32_t bits = drop.keep(k, row, group) << (lane / 16 * 8);
          bits |= __shfl_xor_sync(0xffffffffu, bits, 16);
          uint32_t keep = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t of_row = __shfl_sync(0xffffffffu, bits, lane_k(i));
            keep |= (of_row >> g & 1u) << i | (of_row >> (8 + g) & 1u) << (4 + i);
          }
          Left<T> masked = left;
          mask_left(masked, keep);
#pragma unroll
          for (int n = 0; n < NT; n += 2) {
            if (adapter_of[n * 8] > k || adapter_of[n * 8 + 15] < k) continue;
            Right<P> right[2];
            load_right_pair_transposed(right[0], right[1], hs, k0, n * 8);
            if (adapter_of[n * 8 + g] != k) clear_right(right[0]);
            if (adapter_of[n * 8 + 8 + g] != k) clear_right(right[1]);
            multiply(acc[n], masked, right[0]);
            multiply(acc[n + 1], masked, right[1]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long column = column0 + warp * 16 + g + 8 * (i >> 1);
      const int j = r0 + n * 8 + 2 * t + (i & 1);
      if (column < p.columns && j < R) static_cast<Acc*>(p.partial)[(static_cast<long long>(blockIdx.z) * R + j) * p.columns + column] = acc[n][i];
    }
  }
}

}  // namespace tsugi

#define TSUGI_KERNEL(T, P, RT)                                                                      \
  extern "C" __global__ void __launch_bounds__(tsugi::XPASS_THREADS, sizeof(tsugi::P) == 2 ? 2 : 1) \
      tsugi_lora_x_pass_##T##_##P##_r##RT(const __grid_constant__ tsugi::XPassParams p) {           \
    tsugi::lora_x_pass<tsugi::T, tsugi::P, RT>(p);                                                  \
  }
TSUGI_EACH_LOW_RANK(TSUGI_KERNEL)
#undef TSUGI_KERNEL
