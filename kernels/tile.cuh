// Fragments of 16x16 (left operand) and 16x8 (right operand) from shared tiles, and their product, for every dtype.
//
// Every dtype spreads a fragment over the warp alike, so that a kernel is written once. With g = lane / 4, t = lane % 4
// and k(i) = 2t, 2t+1, 2t+8, 2t+9 for i = 0..3, a lane holds
//   left   A[g + 8h][k(i)], h = 0, 1      right  B[k(i)][g]      product  C[g + 8h][2t + e], at index 2h + e
// The product is one m16n8k16 in 16 bits; two tf32 steps over {k(0), k(1)} and {k(2), k(3)}, each operand split in a
// large and a small tf32 part (16-bit operands are exact in one), where an operand is fp32; eight m8n8k4 in fp64.
// Nothing rounds an fp32 operand to tf32 and leaves it at that.
#pragma once

#include "common.cuh"

namespace tsugi {

template <class T>
struct Left {
  T v[8];  // fp32, fp64: index 4h + i
};
template <class T>
struct Right {
  T v[4];
};
template <>
struct Left<bf16> {
  uint32_t r[4];  // index h + 2 (i / 2), two elements a register
};
template <>
struct Left<f16> {
  uint32_t r[4];
};
template <>
struct Right<bf16> {
  uint32_t r[2];
};
template <>
struct Right<f16> {
  uint32_t r[2];
};

TSUGI_DEVICE int lane_g() { return static_cast<int>(threadIdx.x) % 32 / 4; }
TSUGI_DEVICE int lane_t() { return static_cast<int>(threadIdx.x) % 4; }
TSUGI_DEVICE int lane_k(int i) { return 2 * lane_t() + (i & 1) + 8 * (i >> 1); }

template <class T>
constexpr bool IS_16BIT = sizeof(T) == 2;

// ---- element access within fragments ------------------------------------------------------------------------------

TSUGI_DEVICE float part(const Left<bf16>& f, int h, int i) { return bf16_to_f32(static_cast<uint16_t>(f.r[h + 2 * (i >> 1)] >> (16 * (i & 1)))); }
TSUGI_DEVICE float part(const Left<f16>& f, int h, int i) { return f16_to_f32(static_cast<uint16_t>(f.r[h + 2 * (i >> 1)] >> (16 * (i & 1)))); }
TSUGI_DEVICE float part(const Left<float>& f, int h, int i) { return f.v[4 * h + i]; }
TSUGI_DEVICE float part(const Right<bf16>& f, int i) { return bf16_to_f32(static_cast<uint16_t>(f.r[i >> 1] >> (16 * (i & 1)))); }
TSUGI_DEVICE float part(const Right<f16>& f, int i) { return f16_to_f32(static_cast<uint16_t>(f.r[i >> 1] >> (16 * (i & 1)))); }
TSUGI_DEVICE float part(const Right<float>& f, int i) { return f.v[i]; }

// Clears the elements whose bit in `keep` (index 4h + i) is 0.
template <class T>
TSUGI_DEVICE void mask_left(Left<T>& f, uint32_t keep) {
  if constexpr (IS_16BIT<T>) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t two = keep >> (4 * h + 2 * j);
        f.r[h + 2 * j] &= (two & 1u ? 0xffffu : 0u) | (two & 2u ? 0xffff0000u : 0u);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) f.v[i] = keep >> i & 1u ? f.v[i] : T(0);
  }
}

template <class T>
TSUGI_DEVICE void clear_right(Right<T>& f) {
  if constexpr (IS_16BIT<T>) {
    f.r[0] = f.r[1] = 0;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) f.v[i] = T(0);
  }
}

template <class T, class A>
TSUGI_DEVICE void set_right(Right<T>& f, int i, A value) {
  if constexpr (IS_16BIT<T>) {
    const uint32_t bits = Element<T>::from(value).bits;
    const uint32_t other = f.r[i >> 1] & (i & 1 ? 0x0000ffffu : 0xffff0000u);
    f.r[i >> 1] = other | bits << (16 * (i & 1));
  } else {
    f.v[i] = static_cast<T>(value);
  }
}

// ---- the product --------------------------------------------------------------------------------------------------

struct Split {
  uint32_t large, small;
};

template <bool EXACT>
TSUGI_DEVICE Split split_tf32(float v) {
  if constexpr (EXACT) {
    return Split{float_bits(v), 0u};
  } else {
    const uint32_t large = f32_to_tf32(v);
    const float rounded = bits_float(large);
    return Split{large, f32_to_tf32(rounded == v ? 0.0f : v - rounded)};
  }
}

template <class TA, class TB>
TSUGI_DEVICE void multiply(float (&c)[4], const Left<TA>& a, const Right<TB>& b) {
  if constexpr (IS_16BIT<TA> && IS_16BIT<TB>) {
    mma_m16n8k16(c, a.r, b.r, TA{});
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t al[4], as[4], bl[2], bs[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Split p = split_tf32<IS_16BIT<TA>>(part(a, h, 2 * s + j));
          al[h + 2 * j] = p.large;
          as[h + 2 * j] = p.small;
        }
        const Split q = split_tf32<IS_16BIT<TB>>(part(b, 2 * s + j));
        bl[j] = q.large;
        bs[j] = q.small;
      }
      if constexpr (!IS_16BIT<TA>) mma_m16n8k8_tf32(c, as, bl);
      if constexpr (!IS_16BIT<TB>) mma_m16n8k8_tf32(c, al, bs);
      mma_m16n8k8_tf32(c, al, bl);
    }
  }
}

TSUGI_DEVICE void multiply(double (&c)[4], const Left<double>& a, const Right<double>& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mma_m8n8k4_f64(c[0], c[1], a.v[i], b.v[i]);
    mma_m8n8k4_f64(c[2], c[3], a.v[4 + i], b.v[i]);
  }
}

// ---- shared tiles -------------------------------------------------------------------------------------------------

// Rows padded by 16 bytes: eight consecutive rows begin in eight different bank groups, as ldmatrix wants.
template <class T>
struct Padded {
  unsigned char* base;
  int pitch;  // bytes

  static __host__ __device__ constexpr int pitch_of(int columns) { return columns * static_cast<int>(sizeof(T)) + 16; }
  TSUGI_DEVICE void* chunk(int row, int column) const { return base + row * pitch + column * static_cast<int>(sizeof(T)); }
  TSUGI_DEVICE T at(int row, int column) const { return *static_cast<const T*>(chunk(row, column)); }
};

// Rows of a multiple of 128 bytes, the 16-byte chunks permuted so that a quad may read 64 consecutive bytes of a row
// (two rows a quarter warp) without bank conflicts.
template <class T>
struct Swizzled {
  unsigned char* base;
  int pitch;

  TSUGI_DEVICE void* chunk(int row, int column) const {
    const int at = column * static_cast<int>(sizeof(T));
    const int turn = (row & 1) << 2 | (row >> 1 & 3);
    return base + row * pitch + (at ^ turn << 4);
  }
};

// Left operand, tile[row0 + m][column0 + k].
template <class T>
TSUGI_DEVICE void load_left(Left<T>& f, const Padded<T>& tile, int row0, int column0) {
  if constexpr (IS_16BIT<T>) {
    const int l = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4(f.r, tile.chunk(row0 + l % 16, column0 + l / 16 * 8));
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f.v[4 * h + i] = tile.at(row0 + lane_g() + 8 * h, column0 + lane_k(i));
    }
  }
}

// Left operand from a tile whose rows are k: tile[row0 + k][column0 + m].
template <class T>
TSUGI_DEVICE void load_left_transposed(Left<T>& f, const Padded<T>& tile, int row0, int column0) {
  if constexpr (IS_16BIT<T>) {
    const int l = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4_trans(f.r, tile.chunk(row0 + l % 8 + l / 16 * 8, column0 + l / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f.v[4 * h + i] = tile.at(row0 + lane_k(i), column0 + lane_g() + 8 * h);
    }
  }
}

// Two right operands side by side from a tile whose rows are n: tile[row0 + n][column0 + k], n = 0..15.
template <class T>
TSUGI_DEVICE void load_right_pair(Right<T>& f0, Right<T>& f1, const Padded<T>& tile, int row0, int column0) {
  if constexpr (IS_16BIT<T>) {
    const int l = static_cast<int>(threadIdx.x) % 32;
    uint32_t r[4];
    ldmatrix_x4(r, tile.chunk(row0 + l % 8 + l / 16 * 8, column0 + l / 8 % 2 * 8));
    f0.r[0] = r[0], f0.r[1] = r[1], f1.r[0] = r[2], f1.r[1] = r[3];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f0.v[i] = tile.at(row0 + lane_g(), column0 + lane_k(i));
      f1.v[i] = tile.at(row0 + 8 + lane_g(), column0 + lane_k(i));
    }
  }
}

// Two right operands side by side from a tile whose rows are k: tile[row0 + k][column0 + n], n = 0..15.
template <class T>
TSUGI_DEVICE void load_right_pair_transposed(Right<T>& f0, Right<T>& f1, const Padded<T>& tile, int row0, int column0) {
  if constexpr (IS_16BIT<T>) {
    const int l = static_cast<int>(threadIdx.x) % 32;
    uint32_t r[4];
    ldmatrix_x4_trans(r, tile.chunk(row0 + l % 16, column0 + l / 16 * 8));
    f0.r[0] = r[0], f0.r[1] = r[1], f1.r[0] = r[2], f1.r[1] = r[3];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f0.v[i] = tile.at(row0 + lane_k(i), column0 + lane_g());
      f1.v[i] = tile.at(row0 + lane_k(i), column0 + 8 + lane_g());
    }
  }
}

// Eight consecutive elements of a row, as a lane's share of two 16-wide k steps: element 4s + i is k(i) of step s.
// Both operands must be read this way; the order of k within 32 columns is then 8t + 4s + i, which no sum minds.
template <class T>
TSUGI_DEVICE Eight<T> load_wide(const Swizzled<T>& tile, int row, int column) {
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < Eight<T>::WORDS; ++i) v.w[i] = load_16(tile.chunk(row, column + i * static_cast<int>(16 / sizeof(T))));
  return v;
}

template <class T>
TSUGI_DEVICE void left_of_wide(Left<T>& f, const Eight<T>& row_g, const Eight<T>& row_g8, int s) {
  if constexpr (IS_16BIT<T>) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      f.r[2 * j] = row_g.word32(2 * s + j);
      f.r[1 + 2 * j] = row_g8.word32(2 * s + j);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.v[i] = get_element(row_g, 4 * s + i);
      f.v[4 + i] = get_element(row_g8, 4 * s + i);
    }
  }
}

template <class T>
TSUGI_DEVICE void right_of_wide(Right<T>& f, const Eight<T>& row_n, int s) {
  if constexpr (IS_16BIT<T>) {
    f.r[0] = row_n.word32(2 * s);
    f.r[1] = row_n.word32(2 * s + 1);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) f.v[i] = get_element(row_n, 4 * s + i);
  }
}

// The eight columns' mask, reduced to step s and two rows: bits for mask_left.
TSUGI_DEVICE uint32_t wide_mask(uint32_t keep_g, uint32_t keep_g8, int s) {
  return (keep_g >> (4 * s) & 15u) | (keep_g8 >> (4 * s) & 15u) << 4;
}

}  // namespace tsugi
