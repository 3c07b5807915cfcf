// Adapters on the experts of a mixture: rows sorted by expert, each row with its own expert's factors, one launch for all.
//
// With F_ke(j, n) the factor of adapter k and expert e (A_ke, or B_ke with its sizes exchanged; any strides), e = expert(m):
//
//   down:    H[m][j] = s_k * sum over n of X[m][n] * keep(k, m, n) / (1 - p) * F_ke(j - begin_k, n)       k = adapter of j
//   up:      out[m][n] = src[m][n] + sum over k of s_k * keep(k, m, n) / (1 - p) * sum over j of H[m][j] * F_ke(j - begin_k, n)
//   factors: dF_ke(j - begin_k, n) = s_k * sum over the rows m of e of H[m][j] * X[m][n] * keep(k, m, n) / (1 - p)
//
// Forward is down of (X, A) and up of (H, B) onto base; backward is down of (dY, B) to dH, up of (dH, A) to dX, factors of
// (dH, X) to dA and of (H, dY) to dB. Rows of no expert have H = 0 and out = src.
//
// Expert e has the rows ends[e-1] .. ends[e]. The host does not know them: it launches as many blocks as there can be tiles,
// and each finds its own. ends that decrease or exceed the rows make every H and out a NaN, and are read no further.
//
// A block takes 64 rows of one expert times 32 columns of R (down) or 64 features (up), or 64 features times 32 of R for all
// rows of an expert (factors): four warps of 16. One tile in flight, no splits: right for every layout first of all. PEFT's
// B has strides (r E, E), so a 32-byte sector holds one element of an expert; it is read once a tile, from L2.
#include "tile.cuh"

namespace tsugi {

constexpr int EXPERTS_ROWS = 64;
constexpr int EXPERTS_FEATURES = 64;
constexpr int EXPERTS_RANKS = 32;
constexpr int EXPERTS_THREADS = 128;

struct ExpertsParams {
  Adapters f;                      // F_k of the first expert; stride: elements from one j to the next
  long long column[MAX_ADAPTERS];  // from one n to the next
  long long expert[MAX_ADAPTERS];  // from one expert to the next
  const void* ends;
  long long ends_stride;
  int ends_bytes;  // 4 or 8
  int experts;
  const void* x;
  long long rows, features, x_stride;
  void* h;
  long long h_stride;
  const void* src;  // may be null
  long long src_stride;
  void* out;
  long long out_stride;
  Dropout dropout;
};

static_assert(sizeof(ExpertsParams) == 2952, "src/cuda/params.rs says the same");

struct ExpertRows {
  int expert;  // `experts` for the rows of nobody
  long long first, last;
  bool valid;  // whether all of ends is in order
};

TSUGI_DEVICE long long expert_end(const ExpertsParams& p, int e) {
  return p.ends_bytes == 8 ? static_cast<const long long*>(p.ends)[e * p.ends_stride] : static_cast<const int*>(p.ends)[e * p.ends_stride];
}

// The rows of tile `tile`, counted over the experts and then over the rows of nobody; none beyond the last tile.
TSUGI_DEVICE ExpertRows tile_of_rows(const ExpertsParams& p, long long tile) {
  ExpertRows found{p.experts, 0, 0, true};
  long long start = 0, passed = 0;
  for (int e = 0; e <= p.experts; ++e) {
    long long end = e < p.experts ? expert_end(p, e) : p.rows;
    if (end < start || end > p.rows) {
      found.valid = false;
      end = start;
    }
    const long long tiles = (end - start + EXPERTS_ROWS - 1) / EXPERTS_ROWS, at = tile - passed;
    if (at >= 0 && at < tiles) {
      found.expert = e;
      found.first = start + at * EXPERTS_ROWS;
      found.last = smaller(found.first + EXPERTS_ROWS, end);
    }
    passed += tiles;
    start = end;
  }
  return found;
}

// The rows of expert `expert`.
TSUGI_DEVICE ExpertRows rows_of_expert(const ExpertsParams& p, int expert) {
  ExpertRows found{expert, 0, 0, true};
  long long start = 0;
  for (int e = 0; e < p.experts; ++e) {
    long long end = expert_end(p, e);
    if (end < start || end > p.rows) {
      found.valid = false;
      end = start;
    }
    if (e == expert) {
      found.first = start;
      found.last = end;
    }
    start = end;
  }
  return found;
}

template <class P>
TSUGI_DEVICE P* factor_of(const ExpertsParams& p, int adapter, int expert) {
  return static_cast<P*>(p.f.ptr[adapter]) + expert * p.expert[adapter];
}

// A not-a-number where ends were refused, else 0; added to what is written.
template <class Acc>
TSUGI_DEVICE Acc poison(bool valid) {
  return valid ? Acc(0) : Acc(bits_float(0x7fc00000u));
}

// tile[r][c] = source[(row0 + r) * stride + column0 + c] for the rows before `last_row` and the columns before `columns`.
template <class T, int ROWS, int COLUMNS>
TSUGI_DEVICE void stage_rows(const Padded<T>& tile, const T* source, long long stride, long long row0, long long last_row, long long column0, long long columns) {
  constexpr int PER = 16 / sizeof(T), ROW = COLUMNS / PER;
  const bool aligned = aligned_rows(source, stride) && column0 % PER == 0;
  for (int c = static_cast<int>(threadIdx.x); c < ROWS * ROW; c += EXPERTS_THREADS) {
    const int r = c / ROW, i = c % ROW * PER;
    const long long valid = row0 + r < last_row ? columns - column0 - i : 0;
    stage_chunk(tile.chunk(r, i), source + (row0 + r) * stride + column0 + i, valid, aligned);
  }
}

// Which elements of a 16 x 16 left operand whose columns are features are kept: row0 + g + 8h, feature0 + k(i).
TSUGI_DEVICE uint32_t keep_features_along(const DropoutState& drop, int adapter, long long row0, long long feature0) {
  uint32_t keep = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const uint32_t bits = drop.keep(adapter, row0 + lane_g() + 8 * h, feature0 / 8 + group);
      keep |= (bits >> (2 * lane_t()) & 3u) << (4 * h + 2 * group);
    }
  }
  return keep;
}

template <class T, class P>
struct ExpertsShape {
  static constexpr int X_PITCH = Padded<T>::pitch_of(EXPERTS_FEATURES);
  static constexpr int F_PITCH = Padded<P>::pitch_of(EXPERTS_FEATURES), H_PITCH = Padded<P>::pitch_of(EXPERTS_RANKS);
  static constexpr int DOWN = EXPERTS_ROWS * X_PITCH + EXPERTS_RANKS * F_PITCH;
  static constexpr int UP = EXPERTS_ROWS * H_PITCH + EXPERTS_RANKS * F_PITCH;
  static constexpr int FACTORS = EXPERTS_RANKS * (X_PITCH + H_PITCH);
};

template <class T, class P>
TSUGI_DEVICE void lora_experts_down(const ExpertsParams& p) {
  using Shape = ExpertsShape<T, P>;
  using Acc = typename Element<P>::Acc;
  constexpr int NT = EXPERTS_RANKS / 8;
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, adapter_of, EXPERTS_RANKS);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, g = lane_g(), t = lane_t();
  const int R = p.f.columns(), r0 = static_cast<int>(blockIdx.y) * EXPERTS_RANKS;
  const ExpertRows mine = tile_of_rows(p, blockIdx.x);
  if (mine.first >= mine.last) return;
  for (int j = tid; j < EXPERTS_RANKS; j += EXPERTS_THREADS) adapter_of[j] = p.f.of(smaller(r0 + j, R - 1));
  const Padded<T> xs{shared, Shape::X_PITCH};
  const Padded<P> fs{shared + EXPERTS_ROWS * Shape::X_PITCH, Shape::F_PITCH};
  const DropoutState drop(p.dropout);
  const long long features = mine.expert < p.experts ? p.features : 0;

  Acc acc[NT][4] = {};
  for (long long n0 = 0; n0 < features; n0 += EXPERTS_FEATURES) {
    __syncthreads();
    stage_rows<T, EXPERTS_ROWS, EXPERTS_FEATURES>(xs, static_cast<const T*>(p.x), p.x_stride, mine.first, mine.last, n0, features);
    cp_async_commit();
    for (int c = tid; c < EXPERTS_RANKS * EXPERTS_FEATURES; c += EXPERTS_THREADS) {
      const int j = c / EXPERTS_FEATURES, i = c % EXPERTS_FEATURES, k = adapter_of[j];
      const bool inside = r0 + j < R && n0 + i < features;
      const long long at = (r0 + j - p.f.begin[k]) * p.f.stride[k] + (n0 + i) * p.column[k];
      *static_cast<P*>(fs.chunk(j, i)) = inside ? factor_of<P>(p, k, mine.expert)[at] : zero_of<P>();
    }
    cp_async_wait<0>();
    __syncthreads();
    const int adapter_first = adapter_of[0], adapter_last = drop.threshold ? adapter_of[EXPERTS_RANKS - 1] : adapter_first;
#pragma unroll 1
    for (int k0 = 0; k0 < EXPERTS_FEATURES; k0 += 16) {
      Left<T> left;
      load_left(left, xs, warp * 16, k0);
      for (int k = adapter_first; k <= adapter_last; ++k) {
        Left<T> masked = left;
        if (drop.threshold) mask_left(masked, keep_features_along(drop, k, mine.first + warp * 16, n0 + k0));
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          Right<P> right[2];
          load_right_pair(right[0], right[1], fs, n * 8, k0);
          if (drop.threshold && adapter_of[n * 8 + g] != k) clear_right(right[0]);
          if (drop.threshold && adapter_of[n * 8 + 8 + g] != k) clear_right(right[1]);
          multiply(acc[n], masked, right[0]);
          multiply(acc[n + 1], masked, right[1]);
        }
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long row = mine.first + warp * 16 + g + 8 * (i >> 1);
      const int j = n * 8 + 2 * t + (i & 1);
      if (row >= mine.last || r0 + j >= R) continue;
      const Acc scale = static_cast<Acc>(p.f.scale[adapter_of[j]] * p.dropout.factor);
      static_cast<P*>(p.h)[row * p.h_stride + r0 + j] = Element<P>::from(acc[n][i] * scale + poison<Acc>(mine.valid));
    }
  }
}

template <class T, class P>
TSUGI_DEVICE void lora_experts_up(const ExpertsParams& p) {
  using Shape = ExpertsShape<T, P>;
  using Acc = typename Element<P>::Acc;
  constexpr int NT = EXPERTS_FEATURES / 8;
  DYNAMIC_SHARED(shared);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, g = lane_g(), t = lane_t();
  const ExpertRows mine = tile_of_rows(p, blockIdx.x);
  if (mine.first >= mine.last) return;
  const long long column0 = static_cast<long long>(blockIdx.y) * EXPERTS_FEATURES;
  const Padded<P> hs{shared, Shape::H_PITCH};
  const Padded<P> fs{shared + EXPERTS_ROWS * Shape::H_PITCH, Shape::F_PITCH};
  const DropoutState drop(p.dropout);
  const int adapters = mine.expert < p.experts ? p.f.count : 0;

  Acc sum[NT][4] = {};
  for (int k = 0; k < adapters; ++k) {
    const int begin = p.f.begin[k], end = p.f.begin[k + 1];
    const P* f = factor_of<P>(p, k, mine.expert);
    Acc part[NT][4] = {};
    for (int j0 = begin; j0 < end; j0 += EXPERTS_RANKS) {
      __syncthreads();
      stage_rows<P, EXPERTS_ROWS, EXPERTS_RANKS>(hs, static_cast<const P*>(p.h), p.h_stride, mine.first, mine.last, j0, end);
      cp_async_commit();
      for (int c = tid; c < EXPERTS_RANKS * EXPERTS_FEATURES; c += EXPERTS_THREADS) {
        const int j = c / EXPERTS_FEATURES, i = c % EXPERTS_FEATURES;
        const bool inside = j0 + j < end && column0 + i < p.features;
        const long long at = (j0 + j - begin) * p.f.stride[k] + (column0 + i) * p.column[k];
        *static_cast<P*>(fs.chunk(j, i)) = inside ? f[at] : zero_of<P>();
      }
      cp_async_wait<0>();
      __syncthreads();
      for (int j = 0; j < EXPERTS_RANKS && j0 + j < end; j += 16) {
        Left<P> left;
        load_left(left, hs, warp * 16, j);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          Right<P> right[2];
          load_right_pair_transposed(right[0], right[1], fs, j, n * 8);
          multiply(part[n], left, right[0]);
          multiply(part[n + 1], left, right[1]);
        }
      }
    }
    const Acc scale = static_cast<Acc>(p.f.scale[k] * p.dropout.factor);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t keep[2] = {0xffu, 0xffu};
      if (drop.threshold) {
#pragma unroll
        for (int half = 0; half < 2; ++half) keep[half] = drop.keep(k, mine.first + warp * 16 + g + 8 * half, column0 / 8 + n);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] += keep[i >> 1] >> (2 * t + (i & 1)) & 1u ? part[n][i] * scale : Acc(0);
    }
  }

  const T* src = static_cast<const T*>(p.src);
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long row = mine.first + warp * 16 + g + 8 * (i >> 1), column = column0 + n * 8 + 2 * t + (i & 1);
      if (row >= mine.last || column >= p.features) continue;
      const Acc base = src ? static_cast<Acc>(widen(src[row * p.src_stride + column])) : Acc(0);
      static_cast<T*>(p.out)[row * p.out_stride + column] = Element<T>::from(base + sum[n][i] + poison<Acc>(mine.valid));
    }
  }
}

template <class T, class P>
TSUGI_DEVICE void lora_experts_factors(const ExpertsParams& p) {
  using Shape = ExpertsShape<T, P>;
  using Acc = typename Element<P>::Acc;
  constexpr int NT = EXPERTS_RANKS / 8, STEP = EXPERTS_RANKS;
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, adapter_of, EXPERTS_RANKS);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, g = lane_g(), t = lane_t();
  const int R = p.f.columns(), r0 = static_cast<int>(blockIdx.y) * EXPERTS_RANKS;
  const ExpertRows mine = rows_of_expert(p, static_cast<int>(blockIdx.z));
  const long long column0 = static_cast<long long>(blockIdx.x) * EXPERTS_FEATURES;
  for (int j = tid; j < EXPERTS_RANKS; j += EXPERTS_THREADS) adapter_of[j] = p.f.of(smaller(r0 + j, R - 1));
  const Padded<T> xs{shared, Shape::X_PITCH};
  const Padded<P> hs{shared + STEP * Shape::X_PITCH, Shape::H_PITCH};
  const DropoutState drop(p.dropout);

  Acc acc[NT][4] = {};
  for (long long row0 = mine.first; row0 < mine.last; row0 += STEP) {
    __syncthreads();
    stage_rows<T, STEP, EXPERTS_FEATURES>(xs, static_cast<const T*>(p.x), p.x_stride, row0, mine.last, column0, p.features);
    stage_rows<P, STEP, EXPERTS_RANKS>(hs, static_cast<const P*>(p.h), p.h_stride, row0, mine.last, r0, R);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int adapter_first = adapter_of[0], adapter_last = drop.threshold ? adapter_of[EXPERTS_RANKS - 1] : adapter_first;
#pragma unroll 1
    for (int k0 = 0; k0 < STEP; k0 += 16) {
      Left<T> left;
      load_left_transposed(left, xs, k0, warp * 16);
      for (int k = adapter_first; k <= adapter_last; ++k) {
        Left<T> masked = left;
        if (drop.threshold) {
          // As in lora_x_pass: a lane draws one group of one row, and collects the bits of its own four rows.
          uint32_t bits = drop.keep(k, row0 + k0 + lane % 16, column0 / 8 + warp * 2 + lane / 16) << (lane / 16 * 8);
          bits |= __shfl_xor_sync(0xffffffffu, bits, 16);
          uint32_t keep = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t of_row = __shfl_sync(0xffffffffu, bits, lane_k(i));
            keep |= (of_row >> g & 1u) << i | (of_row >> (8 + g) & 1u) << (4 + i);
          }
          mask_left(masked, keep);
        }
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          Right<P> right[2];
          load_right_pair_transposed(right[0], right[1], hs, k0, n * 8);
          if (drop.threshold && adapter_of[n * 8 + g] != k) clear_right(right[0]);
          if (drop.threshold && adapter_of[n * 8 + 8 + g] != k) clear_right(right[1]);
          multiply(acc[n], masked, right[0]);
          multiply(acc[n + 1], masked, right[1]);
        }
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long column = column0 + warp * 16 + g + 8 * (i >> 1);
      const int j = n * 8 + 2 * t + (i & 1);
      if (column >= p.features || r0 + j >= R) continue;
      const int k = adapter_of[j];
      const Acc scale = static_cast<Acc>(p.f.scale[k] * p.dropout.factor);
      const long long at = (r0 + j - p.f.begin[k]) * p.f.stride[k] + column * p.column[k];
      factor_of<P>(p, k, mine.expert)[at] = Element<P>::from(acc[n][i] * scale + poison<Acc>(mine.valid));
    }
  }
}

}  // namespace tsugi

// up: two blocks an SM at least. Told nothing, the compiler aims at four on sm_80, with 128 registers, and spills.
#define TSUGI_KERNEL(T, P)                                                                                             \
  extern "C" __global__ void __launch_bounds__(tsugi::EXPERTS_THREADS)                                                 \
      tsugi_lora_experts_down_##T##_##P(const __grid_constant__ tsugi::ExpertsParams p) {                              \
    tsugi::lora_experts_down<tsugi::T, tsugi::P>(p);                                                                   \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(tsugi::EXPERTS_THREADS, 2)                                              \
      tsugi_lora_experts_up_##T##_##P(const __grid_constant__ tsugi::ExpertsParams p) {                                \
    tsugi::lora_experts_up<tsugi::T, tsugi::P>(p);                                                                     \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(tsugi::EXPERTS_THREADS)                                                 \
      tsugi_lora_experts_factors_##T##_##P(const __grid_constant__ tsugi::ExpertsParams p) {                           \
    tsugi::lora_experts_factors<tsugi::T, tsugi::P>(p);                                                                \
  }
TSUGI_KERNEL(bf16, bf16)
TSUGI_KERNEL(f16, f16)
TSUGI_KERNEL(bf16, f32)
TSUGI_KERNEL(f16, f32)
TSUGI_KERNEL(f32, f32)
TSUGI_KERNEL(f64, f64)
#undef TSUGI_KERNEL
