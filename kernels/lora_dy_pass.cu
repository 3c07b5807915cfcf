// dH = dY diag(s) B and dB = s dY^T H for K adapters at once: one read of dY [M, O].
//
//   dH[m][j] = s_k * sum over o of dY[m][o] * B_k[o][j - begin_k]          dB_k[o][j - begin_k] = s_k * sum over m of dY[m][o] * H[m][j]
//
// A block takes a macro tile: a range of rows and 8 warps x WIDE columns. A warp owns its columns: their share of B stays in
// registers as fragments, and so does their dB, for all rows. Its share of dH is added to the other warps' in shared memory,
// in order, every 16 rows. What is left to lora_reduce: dh_partial[column block][m][j] and db_partial[split][o][j], and s.
//
// H100, M=8192, O=4096, bf16, R=32: dY is 67 MB, 22 us at 3.0 TB/s; 4.3 GFLOP, 7 us of mma.sync. Blocks of 512 columns, 8 x 16
// splits of 512 rows = 128 blocks on 132 SMs, one an SM (156 registers, 87 KB), 3 stages of 16.6 KB in flight: 50 KB an SM
// where 3.0 TB/s at 800 ns needs 18 KB. Partials 8.4 + 8.4 MB, a quarter of dY, written and read through L2 (50 MB), 5 us if it
// all went to memory. Shared memory: 1 write, 2 reads of dY, 2 for the dH exchange: 67 of 128 bytes a clock at 3.0 TB/s.
#include "tile.cuh"

namespace tsugi {

constexpr int DYPASS_ROWS = 16;
constexpr int DYPASS_THREADS = 256;
constexpr int DYPASS_STAGES = 4;
// Columns a warp: as many as its dB and B fragments leave registers for.
constexpr int DYPASS_WIDE_16 = 64;
constexpr int DYPASS_WIDE_32 = 32;
constexpr int DYPASS_WIDE_64 = 16;

struct DyPassParams {
  const void* dy;
  long long rows, columns, dy_stride;
  const void* h;     // null if dB is not wanted
  long long h_stride;
  void* dh_partial;  // [column blocks][rows][R], or null: dH is not wanted
  void* db_partial;  // [splits][columns][R], or null: dB is not wanted
  long long rows_per_split;
  Adapters b;  // B_k [O, r_k]
};

static_assert(sizeof(DyPassParams) == 1872, "src/cuda/params.rs says the same");

template <class T, class P, int RT>
struct DyPassShape {
  static constexpr int WIDE = sizeof(P) == 8 ? DYPASS_WIDE_64 : sizeof(P) == 4 || RT == 64 ? DYPASS_WIDE_32 : DYPASS_WIDE_16;
  static constexpr int COLUMNS = DYPASS_THREADS / 32 * WIDE;
  static constexpr int Y_PITCH = Padded<T>::pitch_of(COLUMNS), H_PITCH = Padded<P>::pitch_of(RT);
  static constexpr int STAGE_BYTES = DYPASS_ROWS * (Y_PITCH + H_PITCH);
  static constexpr int EXCHANGE_BYTES = DYPASS_THREADS / 32 * DYPASS_ROWS * RT * static_cast<int>(sizeof(typename Element<P>::Acc));
  static constexpr int SHARED = DYPASS_STAGES * STAGE_BYTES + EXCHANGE_BYTES;
};

template <class T, class P, int RT>
TSUGI_DEVICE void lora_dy_pass(const DyPassParams& p) {
  using Shape = DyPassShape<T, P, RT>;
  using Acc = typename Element<P>::Acc;
  constexpr int ROWS = DYPASS_ROWS, STAGES = DYPASS_STAGES, WARPS = DYPASS_THREADS / 32, NT = RT / 8, KT = Shape::WIDE / 16;
  DYNAMIC_SHARED(shared);
  Acc* exchange = reinterpret_cast<Acc*>(shared + STAGES * Shape::STAGE_BYTES);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, g = lane_g(), t = lane_t();
  const int R = p.b.columns(), r0 = static_cast<int>(blockIdx.y) * RT;
  const long long column0 = static_cast<long long>(blockIdx.x) * Shape::COLUMNS, mine0 = column0 + warp * Shape::WIDE;
  const long long first = static_cast<long long>(blockIdx.z) * p.rows_per_split, last = smaller(first + p.rows_per_split, p.rows);
  const T* dy = static_cast<const T*>(p.dy);
  const P* h = static_cast<const P*>(p.h);
  const bool want_dh = p.dh_partial != nullptr, want_db = p.db_partial != nullptr;
  const bool y_aligned = aligned_rows(dy, p.dy_stride), h_aligned = aligned_rows(h, p.h_stride);

  auto tiles = [&](int slot, Padded<T>& ys, Padded<P>& hs) {
    ys = {shared + slot * Shape::STAGE_BYTES, Shape::Y_PITCH};
    hs = {shared + slot * Shape::STAGE_BYTES + ROWS * Shape::Y_PITCH, Shape::H_PITCH};
  };
  auto stage = [&](long long row0, int slot) {
    Padded<T> ys;
    Padded<P> hs;
    tiles(slot, ys, hs);
    constexpr int PER_Y = 16 / sizeof(T), PER_H = 16 / sizeof(P);
    constexpr int Y_ROW = Shape::COLUMNS / PER_Y, H_ROW = RT / PER_H;
    for (int c = tid; c < ROWS * Y_ROW; c += DYPASS_THREADS) {
      const int r = c / Y_ROW, i = c % Y_ROW * PER_Y;
      const long long valid = row0 + r < last ? p.columns - column0 - i : 0;
      stage_chunk(ys.chunk(r, i), dy + (row0 + r) * p.dy_stride + column0 + i, valid, y_aligned);
    }
    if (!want_db) return;
    for (int c = tid; c < ROWS * H_ROW; c += DYPASS_THREADS) {
      const int r = c / H_ROW, j = c % H_ROW * PER_H;
      stage_chunk(hs.chunk(r, j), h + (row0 + r) * p.h_stride + r0 + j, row0 + r < last ? R - r0 - j : 0, h_aligned);
    }
  };

  const long long steps = last > first ? (last - first + ROWS - 1) / ROWS : 0;
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) stage(first + s * ROWS, s);
    cp_async_commit();
  }

  Right<P> weight[KT][NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int j = r0 + n * 8 + g, k = p.b.of(smaller(j, R - 1));
    const P* b = static_cast<const P*>(p.b.ptr[k]) + (j - p.b.begin[k]);
#pragma unroll
    for (int kk = 0; kk < KT; ++kk) {
      clear_right(weight[kk][n]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const long long o = mine0 + kk * 16 + lane_k(i);
        if (j < R && o < p.columns) set_right(weight[kk][n], i, widen(b[o * p.b.stride[k]]));
      }
    }
  }

  Acc db[KT][NT][4] = {};
  for (long long step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) stage(first + (step + STAGES - 1) * ROWS, static_cast<int>((step + STAGES - 1) % STAGES));
    cp_async_commit();
    Padded<T> ys;
    Padded<P> hs;
    tiles(static_cast<int>(step % STAGES), ys, hs);

    if (want_dh) {
      Acc dh[NT][4] = {};
#pragma unroll
      for (int kk = 0; kk < KT; ++kk) {
        Left<T> left;
        load_left(left, ys, 0, warp * Shape::WIDE + kk * 16);
#pragma unroll
        for (int n = 0; n < NT; ++n) multiply(dh[n], left, weight[kk][n]);
      }
      Acc* mine = exchange + warp * ROWS * RT;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[(g + 8 * (i >> 1)) * RT + n * 8 + 2 * t + (i & 1)] = dh[n][i];
      }
    }

    if (want_db) {
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        Right<P> right[2];
        load_right_pair_transposed(right[0], right[1], hs, 0, n * 8);
#pragma unroll
        for (int kk = 0; kk < KT; ++kk) {
          Left<T> left;
          load_left_transposed(left, ys, 0, warp * Shape::WIDE + kk * 16);
          multiply(db[kk][n], left, right[0]);
          multiply(db[kk][n + 1], left, right[1]);
        }
      }
    }
    __syncthreads();
    if (!want_dh) continue;
    for (int e = tid; e < ROWS * RT; e += DYPASS_THREADS) {
      Acc sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += exchange[w * ROWS * RT + e];
      const long long row = first + step * ROWS + e / RT;
      const int j = r0 + e % RT;
      if (row < last && j < R) static_cast<Acc*>(p.dh_partial)[(static_cast<long long>(blockIdx.x) * p.rows + row) * R + j] = sum;
    }
  }
  cp_async_wait<0>();
  if (!want_db) return;

#pragma unroll
  for (int kk = 0; kk < KT; ++kk) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const long long o = mine0 + kk * 16 + g + 8 * (i >> 1);
        const int j = r0 + n * 8 + 2 * t + (i & 1);
        if (o < p.columns && j < R) static_cast<Acc*>(p.db_partial)[(static_cast<long long>(blockIdx.z) * p.columns + o) * R + j] = db[kk][n][i];
      }
    }
  }
}

}  // namespace tsugi

#define TSUGI_KERNEL(T, P, RT)                                                              \
  extern "C" __global__ void __launch_bounds__(tsugi::DYPASS_THREADS, 1)                    \
      tsugi_lora_dy_pass_##T##_##P##_r##RT(const __grid_constant__ tsugi::DyPassParams p) { \
    tsugi::lora_dy_pass<tsugi::T, tsugi::P, RT>(p);                                         \
  }
TSUGI_EACH_LOW_RANK(TSUGI_KERNEL)
#undef TSUGI_KERNEL
