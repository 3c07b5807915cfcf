// What every kernel shares: element types, 8-element access, Philox dropout, the adapter table, block reductions.
#pragma once

#include "mma.cuh"

namespace tsugi {

constexpr int MAX_ADAPTERS = 64;

using f32 = float;
using f64 = double;

// The instances of a LoRA kernel: X(activations, adapters, columns of R a block). More columns take more blocks.
#define TSUGI_EACH_LOW_RANK(X)                          \
  X(bf16, bf16, 16) X(bf16, bf16, 32) X(bf16, bf16, 64) \
  X(f16, f16, 16) X(f16, f16, 32) X(f16, f16, 64)       \
  X(bf16, f32, 16) X(bf16, f32, 32)                     \
  X(f16, f32, 16) X(f16, f32, 32)                       \
  X(f32, f32, 16) X(f32, f32, 32)                       \
  X(f64, f64, 16)

// ---- element types ------------------------------------------------------------------------------------------------

TSUGI_DEVICE float widen(bf16 v) { return bf16_to_f32(v.bits); }
TSUGI_DEVICE float widen(f16 v) { return f16_to_f32(v.bits); }
TSUGI_DEVICE float widen(float v) { return v; }
TSUGI_DEVICE double widen(double v) { return v; }

template <class T>
struct Element;
template <>
struct Element<bf16> {
  using Acc = float;
  static TSUGI_DEVICE bf16 from(float v) { return bf16{f32_to_bf16(v)}; }
  static TSUGI_DEVICE bf16 from(double v) { return from(static_cast<float>(v)); }
};
template <>
struct Element<f16> {
  using Acc = float;
  static TSUGI_DEVICE f16 from(float v) { return f16{f32_to_f16(v)}; }
  static TSUGI_DEVICE f16 from(double v) { return from(static_cast<float>(v)); }
};
template <>
struct Element<float> {
  using Acc = float;
  static TSUGI_DEVICE float from(float v) { return v; }
  static TSUGI_DEVICE float from(double v) { return static_cast<float>(v); }
};
template <>
struct Element<double> {
  using Acc = double;
  static TSUGI_DEVICE double from(double v) { return v; }
};

template <class T>
TSUGI_DEVICE T zero_of() {
  return Element<T>::from(typename Element<T>::Acc(0));
}

template <class T>
TSUGI_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
TSUGI_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// ---- eight elements at a time -------------------------------------------------------------------------------------

// Eight consecutive elements as 16-byte words: 1 for 16-bit types, 2 for fp32, 4 for fp64.
template <class T>
struct Eight {
  static constexpr int WORDS = 8 * sizeof(T) / 16;
  uint4 w[WORDS];

  // i must be a compile-time constant after unrolling.
  TSUGI_DEVICE uint32_t word32(int i) const {
    const uint4& v = w[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
  TSUGI_DEVICE void set_word32(int i, uint32_t b) {
    uint4& v = w[i / 4];
    (i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w) = b;
  }
};

TSUGI_DEVICE float get_element(const Eight<bf16>& v, int i) { return bf16_to_f32(static_cast<uint16_t>(v.word32(i / 2) >> (16 * (i & 1)))); }
TSUGI_DEVICE float get_element(const Eight<f16>& v, int i) { return f16_to_f32(static_cast<uint16_t>(v.word32(i / 2) >> (16 * (i & 1)))); }
TSUGI_DEVICE float get_element(const Eight<float>& v, int i) { return bits_float(v.word32(i)); }
TSUGI_DEVICE double get_element(const Eight<double>& v, int i) {
  const uint64_t b = static_cast<uint64_t>(v.word32(2 * i + 1)) << 32 | v.word32(2 * i);
#ifdef __CUDACC__
  return __longlong_as_double(static_cast<long long>(b));
#else
  double d;
  memcpy(&d, &b, 8);
  return d;
#endif
}

template <class T, class A>
TSUGI_DEVICE Eight<T> pack_eight(const A (&v)[8]) {
  Eight<T> out;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = Element<T>::from(v[2 * i]).bits, high = Element<T>::from(v[2 * i + 1]).bits;
      out.set_word32(i, low | high << 16);
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out.set_word32(i, float_bits(static_cast<float>(v[i])));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double d = static_cast<double>(v[i]);
#ifdef __CUDACC__
      const uint64_t b = static_cast<uint64_t>(__double_as_longlong(d));
#else
      uint64_t b;
      memcpy(&b, &d, 8);
#endif
      out.set_word32(2 * i, static_cast<uint32_t>(b));
      out.set_word32(2 * i + 1, static_cast<uint32_t>(b >> 32));
    }
  }
  return out;
}

// True where rows that start at p and lie `stride` elements apart can be read 16 bytes at a time.
template <class T>
TSUGI_DEVICE bool aligned_rows(const T* p, long long stride) {
  return ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride * static_cast<long long>(sizeof(T)))) & 15) == 0;
}

// Elements p[0..8), of which the first `valid` exist and the others are zero.
template <class T>
TSUGI_DEVICE Eight<T> load_eight(const T* p, long long valid, bool aligned) {
  Eight<T> out;
  if (aligned && valid >= 8) {
#pragma unroll
    for (int i = 0; i < Eight<T>::WORDS; ++i) out.w[i] = load_16(reinterpret_cast<const char*>(p) + 16 * i);
  } else {
    typename Element<T>::Acc v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < valid ? widen(p[i]) : typename Element<T>::Acc(0);
    out = pack_eight<T>(v);
  }
  return out;
}

template <class T>
TSUGI_DEVICE void store_eight(T* p, const Eight<T>& v, long long valid, bool aligned) {
  if (aligned && valid >= 8) {
#pragma unroll
    for (int i = 0; i < Eight<T>::WORDS; ++i) store_16(reinterpret_cast<char*>(p) + 16 * i, v.w[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) p[i] = Element<T>::from(get_element(v, i));
    }
  }
}

// One 16-byte chunk of a shared tile: `valid` elements from global memory, the others zero.
// The caller commits and waits; the chunks that cannot be copied asynchronously are stored at once.
template <class T>
TSUGI_DEVICE void stage_chunk(void* shared, const T* global, long long valid, bool aligned) {
  constexpr int PER = 16 / sizeof(T);
  if (aligned && valid > 0) {
    cp_async_16(shared, global, static_cast<int>(smaller<long long>(valid, PER)) * static_cast<int>(sizeof(T)));
    return;
  }
  T* out = static_cast<T*>(shared);
#pragma unroll
  for (int i = 0; i < PER; ++i) out[i] = i < valid ? global[i] : zero_of<T>();
}

// ---- adapters -----------------------------------------------------------------------------------------------------

// K adapters side by side, by value in the kernel's parameters: adapter k has the columns [begin[k], begin[k + 1]) of R.
struct Adapters {
  void* ptr[MAX_ADAPTERS];
  long long stride[MAX_ADAPTERS];  // elements between rows of adapter k
  double scale[MAX_ADAPTERS];
  int begin[MAX_ADAPTERS + 1];
  int count;

  TSUGI_DEVICE int of(int column) const {
    int k = 0;
    while (k + 1 < count && column >= begin[k + 1]) ++k;
    return k;
  }
  TSUGI_DEVICE int columns() const { return begin[count]; }
};

// ---- dropout ------------------------------------------------------------------------------------------------------

// Element (adapter, row, column) is kept where its 16-bit draw is at least `threshold`; 0 keeps everything.
struct Dropout {
  const long long* rng;  // seed, offset
  double factor;         // 65536 / (65536 - threshold)
  unsigned threshold;
};

struct Philox {
  uint32_t x, y, z, w;
};

// Philox4x32 with 7 rounds (Salmon et al., 2011).
TSUGI_DEVICE Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    if (round) {
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
  }
  return Philox{c0, c1, c2, c3};
}

struct DropoutState {
  uint32_t key0, key1, offset, high, threshold;

  TSUGI_DEVICE explicit DropoutState(const Dropout& d) : key0(0), key1(0), offset(0), high(0), threshold(d.threshold) {
    if (threshold) {
      const uint64_t seed = static_cast<uint64_t>(d.rng[0]), at = static_cast<uint64_t>(d.rng[1]);
      key0 = static_cast<uint32_t>(seed);
      key1 = static_cast<uint32_t>(seed >> 32);
      offset = static_cast<uint32_t>(at);
      high = (static_cast<uint32_t>(at >> 32) & 0xffffu) << 16;
    }
  }

  // Which of the eight columns 8 group .. 8 group + 7 of a row are kept, one bit each.
  TSUGI_DEVICE uint32_t keep(int adapter, long long row, long long group) const {
    const Philox p = philox(static_cast<uint32_t>(group), static_cast<uint32_t>(row), static_cast<uint32_t>(adapter) | high, offset, key0, key1);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t w = i == 0 ? p.x : i == 1 ? p.y : i == 2 ? p.z : p.w;
      bits |= ((w & 0xffffu) >= threshold ? 1u : 0u) << (2 * i);
      bits |= ((w >> 16) >= threshold ? 1u : 0u) << (2 * i + 1);
    }
    return bits;
  }
};

// ---- reductions ---------------------------------------------------------------------------------------------------

// The sum over the block in a fixed order, in thread 0. `scratch` holds one value a warp.
TSUGI_DEVICE double block_sum(double v, double* scratch) {
#pragma unroll
  for (int d = 16; d; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  if (threadIdx.x % 32 == 0) scratch[warp] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < warps; ++i) v += scratch[i];
  }
  return v;
}

}  // namespace tsugi
