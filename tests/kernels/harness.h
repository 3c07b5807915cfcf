// What the executor tests share: exact buffers, random inputs, an fp64 view of every dtype, and runs under several orders.
#pragma once

#include <cmath>
#include <limits>
#include <random>

#include "common.cuh"

namespace harness {

inline int failures = 0, checks = 0;

inline void report(bool ok, const std::string& what) {
  ++checks;
  if (!ok) {
    ++failures;
    printf("FAIL %s\n", what.c_str());
  }
}

inline std::mt19937_64& generator() {
  static std::mt19937_64 g(20240607);
  return g;
}

template <class T>
const char* name_of();
template <>
inline const char* name_of<tsugi::bf16>() { return "bf16"; }
template <>
inline const char* name_of<tsugi::f16>() { return "f16"; }
template <>
inline const char* name_of<float>() { return "f32"; }
template <>
inline const char* name_of<double>() { return "f64"; }

// Relative error that one rounding to T and a fp32 (fp64) sum may leave.
template <class T>
double tolerance() {
  return std::is_same_v<T, tsugi::bf16> ? 4e-3 : std::is_same_v<T, tsugi::f16> ? 6e-4 : std::is_same_v<T, float> ? 3e-6 : 1e-13;
}

// Rows at a stride inside an allocation of exactly the bytes they span, `shift` elements after a 16-byte boundary.
// What lies between rows is NaN: a kernel that reads it cannot hide it.
template <class T>
struct Matrix {
  long long rows = 0, columns = 0, stride = 0;
  std::vector<T> storage;
  T* data = nullptr;

  Matrix() = default;
  Matrix(long long rows_, long long columns_, int pad = 0, int shift = 0) : rows(rows_), columns(columns_), stride(columns_ + pad) {
    const long long span = rows && columns ? (rows - 1) * stride + columns : 0;
    storage.assign(static_cast<size_t>(span + shift), nan());
    storage.shrink_to_fit();
    data = storage.data() + shift;
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  Matrix(Matrix&&) = default;
  Matrix& operator=(Matrix&&) = default;

  static T nan() { return tsugi::Element<T>::from(std::numeric_limits<float>::quiet_NaN()); }
  T& at(long long r, long long c) { return data[r * stride + c]; }
  double value(long long r, long long c) const { return static_cast<double>(tsugi::widen(data[r * stride + c])); }

  Matrix& random(double scale = 1.0) {
    std::normal_distribution<double> normal(0.0, scale);
    for (long long r = 0; r < rows; ++r) {
      for (long long c = 0; c < columns; ++c) at(r, c) = tsugi::Element<T>::from(normal(generator()));
    }
    return *this;
  }
  void fill(double v) {
    for (long long r = 0; r < rows; ++r) {
      for (long long c = 0; c < columns; ++c) at(r, c) = tsugi::Element<T>::from(v);
    }
  }
};

// Compares with the fp64 reference element by element and as a whole; gaps between rows must still be what they were.
template <class T, class Reference>
void compare(const Matrix<T>& got, Reference&& reference, double tol, const std::string& what) {
  double error2 = 0, norm2 = 0;
  for (long long r = 0; r < got.rows; ++r) {
    for (long long c = 0; c < got.columns; ++c) {
      const double ref = reference(r, c), d = got.value(r, c) - ref;
      error2 += d * d;
      norm2 += ref * ref;
    }
  }
  const double rms = got.rows > 0 && got.columns > 0 ? std::sqrt(norm2 / static_cast<double>(got.rows * got.columns)) : 0;
  bool ok = std::sqrt(error2) <= tol * std::sqrt(norm2) + 1e-300;
  std::string detail = " relative error " + std::to_string(std::sqrt(error2 / (norm2 + 1e-300)) / tol) + " of the tolerance";
  for (long long r = 0; ok && r < got.rows; ++r) {
    for (long long c = 0; c < got.columns; ++c) {
      const double ref = reference(r, c), d = std::fabs(got.value(r, c) - ref);
      if (!(d <= 4 * tol * (std::fabs(ref) + rms) + 1e-300)) {
        ok = false;
        detail = " at " + std::to_string(r) + "," + std::to_string(c) + ": " + std::to_string(got.value(r, c)) + " is not " + std::to_string(ref);
        break;
      }
    }
  }
  report(ok, what + detail);
}

struct Span {
  void* at;
  size_t bytes;
};
template <class T>
Span span(Matrix<T>& m) {
  return {m.storage.data(), m.storage.size() * sizeof(T)};
}

constexpr int ORDERS = 3;

// Runs `once` (which launches kernels and returns a fault) under several orders and poisons; `outputs` start from the same
// bytes every time and must end with the same bytes. Returns what is wrong, or an empty string.
inline std::string fault_of(const std::vector<Span>& outputs, const std::function<std::string(int seed)>& once) {
  std::vector<std::vector<char>> before, after;
  for (const Span& s : outputs) before.emplace_back(static_cast<char*>(s.at), static_cast<char*>(s.at) + s.bytes);
  for (int seed = 0; seed < ORDERS; ++seed) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (outputs[i].bytes) memcpy(outputs[i].at, before[i].data(), outputs[i].bytes);
    }
    const std::string fault = once(seed);
    if (!fault.empty()) return fault;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const char* at = static_cast<const char*>(outputs[i].at);
      if (seed == 0) {
        after.emplace_back(at, at + outputs[i].bytes);
      } else if (outputs[i].bytes && memcmp(after[i].data(), at, outputs[i].bytes) != 0) {
        return "the result depends on the order of the threads or on memory that nobody wrote";
      }
    }
  }
  return "";
}

inline void run_orders(const std::string& what, const std::vector<Span>& outputs, const std::function<std::string(int seed)>& once) {
  const std::string fault = fault_of(outputs, once);
  report(fault.empty(), what + ": " + fault);
}

// The mask once more, written from its definition and not shared with the kernels.
inline bool kept(unsigned threshold, int adapter, long long row, long long column, unsigned long long seed, unsigned long long offset) {
  if (threshold == 0) return true;
  uint32_t c[4] = {static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row),
                   static_cast<uint32_t>(adapter) | static_cast<uint32_t>(offset >> 32 & 0xffff) << 16, static_cast<uint32_t>(offset)};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    memcpy(c, next, sizeof(c));
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  const int j = static_cast<int>(column % 8);
  return (c[j / 2] >> (16 * (j % 2)) & 0xffffu) >= threshold;
}

struct Case {
  long long rows, inner, outer;  // M, I, O
  std::vector<int> rs;
  unsigned threshold = 0;
  int pad = 0, shift = 0, splits = 1;

  int total() const {
    int sum = 0;
    for (int r : rs) sum += r;
    return sum;
  }
  int adapter(int column) const {
    int k = 0;
    while (column >= rs[static_cast<size_t>(k)]) column -= rs[static_cast<size_t>(k++)];
    return k;
  }
  int begin(int k) const {
    int sum = 0;
    for (int i = 0; i < k; ++i) sum += rs[static_cast<size_t>(i)];
    return sum;
  }
  double factor() const { return 65536.0 / (65536.0 - threshold); }
  double scale(int k) const { return 0.5 + 0.75 * k; }
  std::string text() const {
    std::string s = "M=" + std::to_string(rows) + " I=" + std::to_string(inner) + " O=" + std::to_string(outer) + " r=";
    for (int r : rs) s += std::to_string(r) + ",";
    return s + " p=" + std::to_string(threshold / 65536.0) + " pad=" + std::to_string(pad) + " shift=" + std::to_string(shift) +
           " splits=" + std::to_string(splits);
  }
};

// Every size of 0, 1, 127, 129, every r of 1, 3, 8, 64, one to eight adapters, equal and not, with and without dropout.
// Small, because every thread is a fiber: the cases are chosen for their edges.
inline const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {1, 1, 1, {1}},
      {0, 129, 127, {8}},
      {127, 129, 127, {3}, 6554, 0, 0, 2},
      {129, 127, 129, {8}, 0, 3, 1, 1},
      {129, 96, 128, {16, 16}, 0, 8, 0, 2},
      {64, 128, 96, {16, 16}, 6554, 0, 0, 1},
      {33, 129, 257, {64}, 0, 0, 0, 3},
      {129, 127, 1, {3, 8, 1}, 32768, 1, 1, 2},
      {40, 1, 129, {8, 64, 3, 1}, 6554},
      {20, 130, 65, {1, 3, 8, 5, 2, 16, 4, 7}, 16384, 2, 3, 2},
      {17, 72, 40, {40, 40}, 6554, 0, 0, 1},
  };
  return all;
}

struct Rng {
  long long values[2] = {0x123456789abcdefll, (3ll << 32) | 77};
  bool kept(unsigned threshold, int adapter, long long row, long long column) const {
    return harness::kept(threshold, adapter, row, column, static_cast<unsigned long long>(values[0]), static_cast<unsigned long long>(values[1]));
  }
};

// A_k [r_k, columns] or B_k [rows, r_k], each at its own stride and shift.
template <class P>
struct Pool {
  std::vector<Matrix<P>> part;
  tsugi::Adapters table{};
};

template <class P>
Pool<P> make_pool(const Case& c, long long other, bool rs_are_rows, double scale) {
  Pool<P> pool;
  pool.table.count = static_cast<int>(c.rs.size());
  for (size_t k = 0; k < c.rs.size(); ++k) {
    const int pad = k % 2 ? c.pad : 0, shift = k % 2 ? 0 : c.shift;
    pool.part.push_back(rs_are_rows ? Matrix<P>(c.rs[k], other, pad, shift) : Matrix<P>(other, c.rs[k], pad, shift));
    pool.part.back().random(scale);
    pool.table.ptr[k] = pool.part[k].data;
    pool.table.stride[k] = pool.part[k].stride;
    pool.table.scale[k] = c.scale(static_cast<int>(k));
    pool.table.begin[k + 1] = pool.table.begin[k] + c.rs[k];
  }
  return pool;
}

// H or dH as a table of destinations for lora_reduce.
template <class P>
tsugi::Adapters columns_of(const Case& c, Matrix<P>& h, bool scaled) {
  tsugi::Adapters a{};
  a.count = static_cast<int>(c.rs.size());
  for (int k = 0; k < a.count; ++k) {
    a.begin[k + 1] = a.begin[k] + c.rs[static_cast<size_t>(k)];
    a.ptr[k] = h.data + a.begin[k];
    a.stride[k] = h.stride;
    a.scale[k] = scaled ? c.scale(k) : 1.0;
  }
  return a;
}

// All pairs of dtypes; one of each size under the sanitizers, which take long to compile and look at addresses alone.
template <template <class, class> class Test>
void each_dtype() {
  Test<tsugi::bf16, tsugi::bf16>::run();
  Test<tsugi::f16, float>::run();
  Test<double, double>::run();
#ifndef SIMT_ASAN
  Test<tsugi::f16, tsugi::f16>::run();
  Test<tsugi::bf16, float>::run();
  Test<float, float>::run();
#endif
}

template <class P>
constexpr int widest_tile() {
  return sizeof(P) == 2 ? 64 : sizeof(P) == 4 ? 32 : 16;
}

inline unsigned tiles(long long n, long long tile) { return static_cast<unsigned>((n + tile - 1) / tile); }

inline int finish(const char* what) {
  printf("%s: %d checks, %d failures\n", what, checks, failures);
  return failures ? 1 : 0;
}

}  // namespace harness
