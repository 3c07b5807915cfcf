// Launches of the LoRA kernels as src/cuda/lora.rs makes them, with the reference of each kernel's first comment in fp64.
#pragma once

#include "harness.h"
#include "lora_dy_pass.cu"
#include "lora_expand.cu"
#include "lora_reduce.cu"
#include "lora_shrink.cu"
#include "lora_x_pass.cu"

namespace harness {

using namespace tsugi;

// Columns of R a block: the narrowest instance that holds them all, or the widest.
template <class P, class F>
auto with_tile(int total, F&& f) {
  if constexpr (sizeof(P) == 8) {
    return f(std::integral_constant<int, 16>{});
  } else {
    if (total <= 16) return f(std::integral_constant<int, 16>{});
    if constexpr (sizeof(P) == 2) {
      if (total > 32) return f(std::integral_constant<int, 64>{});
    }
    return f(std::integral_constant<int, 32>{});
  }
}

template <class P>
std::string launch_reduce(const ReduceParams& p, unsigned jobs, int seed) {
  long long size = 0;
  for (unsigned j = 0; j < jobs; ++j) size = larger(size, p.job[j].rows * p.job[j].columns);
  // Fewer blocks than elements, so that the stride loop runs.
  const unsigned blocks = larger(1u, tiles(size, 2 * REDUCE_THREADS));
  return simt::launch({blocks, jobs}, {REDUCE_THREADS}, 0, seed, [&] { lora_reduce<P>(p); });
}

template <class T, class P>
std::string label(const char* op, const Case& c) {
  return std::string(op) + " " + name_of<T>() + "/" + name_of<P>() + " " + c.text();
}

template <class T, class P>
struct Shrink {
  using Acc = typename Element<P>::Acc;
  static void run() {
    for (const Case& c : cases()) one(c);
  }
  static void one(const Case& c) {
    if (c.rows == 0) return;
    Rng rng;
    const int R = c.total();
    Matrix<T> x(c.rows, c.inner, c.pad, c.shift);
    x.random();
    Pool<P> a = make_pool<P>(c, c.inner, true, 1.0);
    Matrix<P> h(c.rows, R, c.pad);
    Matrix<Acc> partial(c.splits, c.rows * R);
    const std::string what = label<T, P>("shrink", c);
    run_orders(what, {span(h), span(partial)}, [&](int seed) {
      ShrinkParams p{x.data, c.rows, c.inner, x.stride, h.data, h.stride, partial.data, c.splits, a.table, {rng.values, c.factor(), c.threshold}};
      std::string fault = with_tile<P>(R, [&](auto tile) {
        constexpr int RT = decltype(tile)::value;
        return simt::launch({tiles(c.rows, SHRINK_ROWS), tiles(R, RT), static_cast<unsigned>(c.splits)}, {SHRINK_THREADS},
                            ShrinkShape<T, P, RT>::SHARED, seed, [&] { lora_shrink<T, P, RT>(p); });
      });
      if (!fault.empty() || c.splits == 1) return fault;
      ReduceParams r{};
      r.job[0] = {partial.data, c.rows, R, c.factor(), c.splits, 0};
      r.out[0] = columns_of(c, h, false);
      return launch_reduce<P>(r, 1, seed);
    });
    compare(h, [&](long long m, long long j) {
      const int k = c.adapter(static_cast<int>(j));
      double sum = 0;
      for (long long i = 0; i < c.inner; ++i) {
        if (rng.kept(c.threshold, k, m, i)) sum += x.value(m, i) * a.part[static_cast<size_t>(k)].value(j - c.begin(k), i);
      }
      return sum * c.factor();
    }, tolerance<P>(), what);
  }
};

template <class T, class P>
struct Expand {
  static void run() {
    for (const Case& c : cases()) {
      for (int mode = 0; mode < 3; ++mode) one(c, mode);
    }
  }
  // mode 0: write only, with bias; 1: in place; 2: from another tensor
  static void one(const Case& c, int mode) {
    if (c.rows == 0) return;
    const int R = c.total();
    Matrix<P> h(c.rows, R, c.pad, c.shift);
    h.random();
    Pool<P> b = make_pool<P>(c, c.outer, false, 1.0);
    Matrix<T> base(c.rows, c.outer, c.pad, c.shift), y(c.rows, c.outer, c.pad, c.shift), bias(1, c.outer, 0, c.shift);
    base.random();
    bias.random();
    if (mode == 1) y.storage = base.storage, y.data = y.storage.data() + c.shift;
    const std::string what = label<T, P>("expand", c) + " mode=" + std::to_string(mode);
    run_orders(what, {span(y)}, [&](int seed) {
      ExpandParams p{h.data, c.rows, c.outer, h.stride, nullptr, 0, nullptr, y.data, y.stride, b.table, {nullptr, 1.0, 0}};
      if (mode == 0) p.bias = bias.data;
      if (mode == 1) p.src = y.data, p.src_stride = y.stride;
      if (mode == 2) p.src = base.data, p.src_stride = base.stride;
      return launch(p, R, false, seed);
    });
    compare(y, [&](long long m, long long o) {
      double sum = mode == 0 ? bias.value(0, o) : base.value(m, o);
      for (int j = 0; j < R; ++j) {
        const int k = c.adapter(j);
        sum += c.scale(k) * h.value(m, j) * b.part[static_cast<size_t>(k)].value(o, j - c.begin(k));
      }
      return sum;
    }, tolerance<T>(), what);
  }
  static std::string launch(const ExpandParams& p, int R, bool dx, int seed) {
    const int inner = smaller((R + 15) / 16 * 16, sizeof(P) == 8 ? EXPAND_INNER_64 : EXPAND_INNER);
    const int h_bytes = EXPAND_ROWS * Padded<P>::pitch_of(inner);
    const int w_bytes = dx ? inner * Padded<P>::pitch_of(EXPAND_COLUMNS) : EXPAND_COLUMNS * Padded<P>::pitch_of(inner);
    const unsigned blocks = tiles(p.rows, EXPAND_ROWS) * tiles(p.columns, EXPAND_COLUMNS);
    return simt::launch({blocks}, {EXPAND_THREADS}, static_cast<size_t>(h_bytes + w_bytes), seed, [&] {
      if (dx) {
        lora_expand<T, P, true>(p);
      } else {
        lora_expand<T, P, false>(p);
      }
    });
  }
};

template <class T, class P>
struct Dx {
  static void run() {
    for (const Case& c : cases()) {
      for (int mode = 0; mode < 2; ++mode) one(c, mode);
    }
  }
  // mode 0: write only; 1: in place
  static void one(const Case& c, int mode) {
    if (c.rows == 0) return;
    Rng rng;
    const int R = c.total();
    Matrix<P> dh(c.rows, R, c.pad, c.shift);
    dh.random();
    Pool<P> a = make_pool<P>(c, c.inner, true, 1.0);
    for (int k = 0; k < a.table.count; ++k) a.table.scale[k] = 1.0;  // dH has the scaling already
    Matrix<T> base(c.rows, c.inner, c.pad, c.shift), dx(c.rows, c.inner, c.pad, c.shift);
    base.random();
    if (mode == 1) dx.storage = base.storage, dx.data = dx.storage.data() + c.shift;
    const std::string what = label<T, P>("dx", c) + " mode=" + std::to_string(mode);
    run_orders(what, {span(dx)}, [&](int seed) {
      ExpandParams p{dh.data, c.rows, c.inner, dh.stride, mode ? dx.data : nullptr, dx.stride, nullptr, dx.data, dx.stride, a.table,
                     {rng.values, c.factor(), c.threshold}};
      return Expand<T, P>::launch(p, R, true, seed);
    });
    compare(dx, [&](long long m, long long i) {
      double sum = mode ? base.value(m, i) : 0;
      for (int j = 0; j < R; ++j) {
        const int k = c.adapter(j);
        if (rng.kept(c.threshold, k, m, i)) sum += c.factor() * dh.value(m, j) * a.part[static_cast<size_t>(k)].value(j - c.begin(k), i);
      }
      return sum;
    }, tolerance<T>(), what);
  }
};

template <class T, class P>
struct DyPass {
  using Acc = typename Element<P>::Acc;
  static void run() {
    for (const Case& c : cases()) one(c);
  }
  static void one(const Case& c) {
    if (c.rows == 0) return;
    const int R = c.total();
    Matrix<T> dy(c.rows, c.outer, c.pad, c.shift);
    dy.random();
    Pool<P> b = make_pool<P>(c, c.outer, false, 1.0), db = make_pool<P>(c, c.outer, false, 1.0);
    Matrix<P> h(c.rows, R, c.pad, c.shift), dh(c.rows, R);
    h.random();
    const long long per_split = (c.rows + c.splits - 1) / c.splits;
    const std::string what = label<T, P>("dy_pass", c);
    with_tile<P>(R, [&](auto tile) {
      constexpr int RT = decltype(tile)::value;
      using Shape = DyPassShape<T, P, RT>;
      const unsigned blocks = tiles(c.outer, Shape::COLUMNS);
      Matrix<Acc> dh_partial(blocks, c.rows * R), db_partial(c.splits, c.outer * R);
      std::vector<Span> outputs{span(dh), span(dh_partial), span(db_partial)};
      for (auto& m : db.part) outputs.push_back(span(m));
      run_orders(what, outputs, [&](int seed) {
        DyPassParams p{dy.data, c.rows, c.outer, dy.stride, h.data, h.stride, dh_partial.data, db_partial.data, per_split, b.table};
        std::string fault = simt::launch({blocks, tiles(R, RT), static_cast<unsigned>(c.splits)}, {DYPASS_THREADS}, Shape::SHARED, seed,
                                         [&] { lora_dy_pass<T, P, RT>(p); });
        if (!fault.empty()) return fault;
        ReduceParams r{};
        r.job[0] = {dh_partial.data, c.rows, R, 1.0, static_cast<int>(blocks), 0};
        r.out[0] = columns_of(c, dh, true);
        r.job[1] = {db_partial.data, c.outer, R, 1.0, c.splits, 0};
        r.out[1] = db.table;
        return launch_reduce<P>(r, 2, seed);
      });
      return 0;
    });
    compare(dh, [&](long long m, long long j) {
      const int k = c.adapter(static_cast<int>(j));
      double sum = 0;
      for (long long o = 0; o < c.outer; ++o) sum += dy.value(m, o) * b.part[static_cast<size_t>(k)].value(o, j - c.begin(k));
      return sum * c.scale(k);
    }, tolerance<P>(), what + " dH");
    for (size_t k = 0; k < db.part.size(); ++k) {
      compare(db.part[k], [&](long long o, long long j) {
        double sum = 0;
        for (long long m = 0; m < c.rows; ++m) sum += dy.value(m, o) * h.value(m, c.begin(static_cast<int>(k)) + j);
        return sum * c.scale(static_cast<int>(k));
      }, tolerance<P>(), what + " dB " + std::to_string(k));
    }
  }
};

template <class T, class P>
struct XPass {
  using Acc = typename Element<P>::Acc;
  static void run() {
    for (const Case& c : cases()) one(c);
  }
  static void one(const Case& c) {
    if (c.rows == 0) return;
    Rng rng;
    const int R = c.total();
    Matrix<T> x(c.rows, c.inner, c.pad, c.shift);
    x.random();
    Matrix<P> dh(c.rows, R, c.pad, c.shift);
    dh.random();
    Pool<P> da = make_pool<P>(c, c.inner, true, 1.0);
    for (int k = 0; k < da.table.count; ++k) da.table.scale[k] = 1.0;
    Matrix<Acc> partial(c.splits, R * c.inner);
    const long long per_split = (c.rows + c.splits - 1) / c.splits;
    std::vector<Span> outputs{span(partial)};
    for (auto& m : da.part) outputs.push_back(span(m));
    const std::string what = label<T, P>("x_pass", c);
    run_orders(what, outputs, [&](int seed) {
      XPassParams p{x.data, c.rows, c.inner, x.stride, dh.data, dh.stride, partial.data, per_split, da.table, {rng.values, c.factor(), c.threshold}};
      std::string fault = with_tile<P>(R, [&](auto tile) {
        constexpr int RT = decltype(tile)::value;
        return simt::launch({tiles(c.inner, XPASS_COLUMNS), tiles(R, RT), static_cast<unsigned>(c.splits)}, {XPASS_THREADS},
                            XPassShape<T, P, RT>::SHARED, seed, [&] { lora_x_pass<T, P, RT>(p); });
      });
      if (!fault.empty()) return fault;
      ReduceParams r{};
      r.job[0] = {partial.data, R, c.inner, c.factor(), c.splits, 1};
      r.out[0] = da.table;
      return launch_reduce<P>(r, 1, seed);
    });
    for (size_t k = 0; k < da.part.size(); ++k) {
      compare(da.part[k], [&](long long j, long long i) {
        double sum = 0;
        for (long long m = 0; m < c.rows; ++m) {
          if (rng.kept(c.threshold, static_cast<int>(k), m, i)) sum += dh.value(m, c.begin(static_cast<int>(k)) + j) * x.value(m, i);
        }
        return sum * c.factor();
      }, tolerance<P>(), what + " dA " + std::to_string(k));
    }
  }
};

}  // namespace harness
