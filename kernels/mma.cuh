// Tensor-core, copy and conversion instructions: the only file with inline PTX, with a host meaning beside each.
//
// Fragment layouts are those of the PTX manual. With g = lane / 4 and t = lane % 4:
//   m16n8k16, 16-bit: a[0] = A[g][2t,2t+1]  a[1] = A[g+8][2t,2t+1]  a[2] = A[g][2t+8,2t+9]  a[3] = A[g+8][2t+8,2t+9]
//                     b[0] = B[2t,2t+1][g]  b[1] = B[2t+8,2t+9][g]
//   m16n8k8, tf32:    a[0] = A[g][t]  a[1] = A[g+8][t]  a[2] = A[g][t+4]  a[3] = A[g+8][t+4]   b[0] = B[t][g]  b[1] = B[t+4][g]
//   m8n8k4, fp64:     a = A[g][t]  b = B[t][g]  c[0,1] = C[g][2t,2t+1]
//   C of m16n8:       c[0,1] = C[g][2t,2t+1]  c[2,3] = C[g+8][2t,2t+1]
#pragma once

#ifdef __CUDACC__
#include <cstdint>
#define TSUGI_DEVICE __device__ __forceinline__
#define SHARED_ARRAY(T, name, n) __shared__ __align__(16) T name[n]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "simt.h"
#define TSUGI_DEVICE inline
#endif

namespace tsugi {

// 16-bit floats are their bits: the conversions below are all that the kernels do with them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

TSUGI_DEVICE uint32_t float_bits(float v) {
#ifdef __CUDACC__
  return __float_as_uint(v);
#else
  uint32_t b;
  memcpy(&b, &v, 4);
  return b;
#endif
}

TSUGI_DEVICE float bits_float(uint32_t b) {
#ifdef __CUDACC__
  return __uint_as_float(b);
#else
  float v;
  memcpy(&v, &b, 4);
  return v;
#endif
}

TSUGI_DEVICE float bf16_to_f32(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }

TSUGI_DEVICE uint16_t f32_to_bf16(float v) {
#ifdef __CUDACC__
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
#else
  const uint32_t b = float_bits(v);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
#endif
}

TSUGI_DEVICE float f16_to_f32(uint16_t b) {
#ifdef __CUDACC__
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(b));
  return r;
#else
  const uint32_t sign = static_cast<uint32_t>(b & 0x8000u) << 16, exponent = b >> 10 & 31u, fraction = b & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float v = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -v : v;
  }
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

TSUGI_DEVICE uint16_t f32_to_f16(float v) {
#ifdef __CUDACC__
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
#else
  const uint32_t b = float_bits(v), magnitude = b & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(b >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {                                               // below 2^-14: a multiple of 2^-24
    const float scaled = bits_float(magnitude) * 16777216.0f;                  // exact
    const uint32_t whole = static_cast<uint32_t>(scaled);
    const float rest = scaled - static_cast<float>(whole);
    const uint32_t up = rest > 0.5f || (rest == 0.5f && (whole & 1u)) ? 1u : 0u;
    return static_cast<uint16_t>(sign | (whole + up));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | rounded >> 13);
#endif
}

// fp32 rounded to the 10 fraction bits of tf32, as fp32 bits.
TSUGI_DEVICE uint32_t f32_to_tf32(float v) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
#else
  const uint32_t b = float_bits(v);
  if ((b & 0x7f800000u) == 0x7f800000u) return b;
  return (b + 0x1000u) & ~0x1fffu;
#endif
}

#ifndef __CUDACC__
namespace host {

template <class Acc>
struct MmaArgs {
  Acc* c;
  const uint32_t *a, *b;
  double a64, b64;
};

template <class Acc>
using MmaRun = void (*)(MmaArgs<Acc>**, unsigned);

// One 16-bit m16n8k16 for a whole warp; `widen` turns 16 bits into a float.
template <float (*widen)(uint16_t)>
inline void mma_16bit(MmaArgs<float>** lanes, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        const uint16_t bits = static_cast<uint16_t>(lanes[lane]->a[i] >> (16 * e));
        a[g + 8 * (i & 1)][2 * t + e + 8 * (i >> 1)] = widen(bits);
        if (i < 2) b[2 * t + e + 8 * i][g] = widen(static_cast<uint16_t>(lanes[lane]->b[i] >> (16 * e)));
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[g + 8 * (i >> 1)][k] * b[k][2 * t + (i & 1)];
      lanes[lane]->c[i] += sum;
    }
  }
}

inline void mma_tf32(MmaArgs<float>** lanes, unsigned) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    // The unit reads 10 fraction bits and drops the rest.
    for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = bits_float(lanes[lane]->a[i] & ~0x1fffu);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = bits_float(lanes[lane]->b[i] & ~0x1fffu);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[g + 8 * (i >> 1)][k] * b[k][2 * t + (i & 1)];
      lanes[lane]->c[i] += sum;
    }
  }
}

inline void mma_f64(MmaArgs<double>** lanes, unsigned) {
  double a[8][4], b[4][8];
  for (int lane = 0; lane < 32; ++lane) {
    a[lane / 4][lane % 4] = lanes[lane]->a64;
    b[lane % 4][lane / 4] = lanes[lane]->b64;
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 2; ++e) {
      double sum = 0;
      for (int k = 0; k < 4; ++k) sum += a[lane / 4][k] * b[k][2 * (lane % 4) + e];
      lanes[lane]->c[e] += sum;
    }
  }
}

struct LdmatrixArgs {
  uint32_t* r;
  const void* row;
};

template <bool TRANS>
inline void ldmatrix(LdmatrixArgs** lanes, unsigned) {
  for (int i = 0; i < 4; ++i) {
    uint16_t m[8][8];
    for (int j = 0; j < 8; ++j) memcpy(m[j], lanes[8 * i + j]->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = TRANS ? m[2 * t][g] : m[g][2 * t], high = TRANS ? m[2 * t + 1][g] : m[g][2 * t + 1];
      lanes[lane]->r[i] = low | high << 16;
    }
  }
}

}  // namespace host
#endif

TSUGI_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::MmaArgs<float> args{c, a, b, 0, 0};
  simt::collective<host::MmaArgs<float>>(~0u, "mma.bf16", SIMT_SITE, &args, &host::mma_16bit<bf16_to_f32>);
#endif
}

TSUGI_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::MmaArgs<float> args{c, a, b, 0, 0};
  simt::collective<host::MmaArgs<float>>(~0u, "mma.f16", SIMT_SITE, &args, &host::mma_16bit<f16_to_f32>);
#endif
}

TSUGI_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::MmaArgs<float> args{c, a, b, 0, 0};
  simt::collective<host::MmaArgs<float>>(~0u, "mma.tf32", SIMT_SITE, &args, &host::mma_tf32);
#endif
}

TSUGI_DEVICE void mma_m8n8k4_f64(double& c0, double& c1, double a, double b) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(c0), "+d"(c1) : "d"(a), "d"(b));
#else
  double c[2] = {c0, c1};
  host::MmaArgs<double> args{c, nullptr, nullptr, a, b};
  simt::collective<host::MmaArgs<double>>(~0u, "mma.f64", SIMT_SITE, &args, &host::mma_f64);
  c0 = c[0];
  c1 = c[1];
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane l brings the address of row l % 8 of matrix l / 8.
TSUGI_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#else
  simt::check_aligned(row, 16, "ldmatrix");
  host::LdmatrixArgs args{r, row};
  simt::collective<host::LdmatrixArgs>(~0u, "ldmatrix", SIMT_SITE, &args, &host::ldmatrix<false>);
#endif
}

TSUGI_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#else
  simt::check_aligned(row, 16, "ldmatrix.trans");
  host::LdmatrixArgs args{r, row};
  simt::collective<host::LdmatrixArgs>(~0u, "ldmatrix.trans", SIMT_SITE, &args, &host::ldmatrix<true>);
#endif
}

// 16 bytes from global to shared memory behind the thread's back; bytes beyond `bytes` become zero.
TSUGI_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
#else
  simt::copy_async(shared, global, bytes);
#endif
}

TSUGI_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::copy_async_commit();
#endif
}

// Waits until at most LEAVE of this thread's groups are still on their way.
template <int LEAVE>
TSUGI_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(LEAVE) : "memory");
#else
  simt::copy_async_wait(LEAVE);
#endif
}

TSUGI_DEVICE uint4 load_16(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const uint4*>(p);
#else
  simt::check_aligned(p, 16, "a 16-byte load");
  uint4 v;
  memcpy(&v, p, 16);
  return v;
#endif
}

TSUGI_DEVICE void store_16(void* p, uint4 v) {
#ifdef __CUDACC__
  *static_cast<uint4*>(p) = v;
#else
  simt::check_aligned(p, 16, "a 16-byte store");
  memcpy(p, &v, 16);
#endif
}

}  // namespace tsugi
