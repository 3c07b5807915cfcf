// The native API of torch.ops.tsugi: one table of schemas, one table of implementations, and between
// them adapters that hand borrowed tensors to Rust.

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "tsugi-kpool/cpp/torch.h"
#include "tsugi-kpool/src/bridge.rs.h"

namespace tsugi {

using Torch = torch::stable::Tensor;
using List = std::vector<Torch>;
using Maybe = std::optional<Torch>;

namespace {

// Borrows the arguments of one op, which it names in what it refuses.
class Borrow {
 public:
  explicit Borrow(const char* op) : op_(op) {}

  Tensor operator()(const char* name, Torch tensor) const {
    return Tensor(op_, name, std::move(tensor));
  }

  std::vector<Tensor> operator()(const char* name, const List& tensors) const {
    std::vector<Tensor> out;
    out.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      out.emplace_back(op_, std::string(name) + "[" + std::to_string(i) + "]", tensors[i]);
    }
    return out;
  }

  // cxx has no optional reference: an absent argument is an empty list.
  std::vector<Tensor> operator()(const char* name, const Maybe& tensor) const {
    std::vector<Tensor> out;
    if (tensor) {
      out.emplace_back(op_, name, *tensor);
    }
    return out;
  }

 private:
  const char* op_;
};

rust::Slice<const double> borrow(const std::vector<double>& values) {
  return {values.data(), values.size()};
}

List release(const std::vector<Tensor>& tensors, size_t start, size_t count) {
  List out;
  out.reserve(count);
  for (size_t i = start; i < start + count; ++i) {
    out.push_back(tensors.at(i).torch());
  }
  return out;
}

// ---- adapters, one an op, in the order of the schemas ----

std::tuple<Torch, Torch> _lora_apply(
    Maybe base, Torch x, Maybe weight, Maybe bias, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng) {
  const Borrow borrow_of(weight ? "lora_linear" : "lora_delta");
  const auto out = bridge::lora_apply({
      .base = borrow_of("base", base),
      .x = borrow_of("x", x),
      .weight = borrow_of("weight", weight),
      .bias = borrow_of("bias", bias),
      .a = borrow_of("A", a),
      .b = borrow_of("B", b),
      .scaling = borrow(scaling),
      .dropout_p = dropout_p,
      .rng = borrow_of("rng", rng),
  });
  return {out->at(0).torch(), out->at(1).torch()};
}

Torch lora_linear(
    Torch x, Torch weight, Maybe bias, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng) {
  return std::get<0>(_lora_apply(
      std::nullopt, std::move(x), std::move(weight), std::move(bias), std::move(a), std::move(b),
      std::move(scaling), dropout_p, std::move(rng)));
}

Torch lora_delta(
    Torch base, Torch x, List a, List b, std::vector<double> scaling, double dropout_p, Maybe rng) {
  return std::get<0>(_lora_apply(
      std::move(base), std::move(x), std::nullopt, std::nullopt, std::move(a), std::move(b),
      std::move(scaling), dropout_p, std::move(rng)));
}

Torch lora_shrink(Torch x, List a, double dropout_p, Maybe rng) {
  const Borrow borrow_of("lora_shrink");
  return bridge::lora_shrink(borrow_of("x", x), borrow_of("A", a), dropout_p, borrow_of("rng", rng))
      ->at(0)
      .torch();
}

void lora_expand_(Torch y, Torch h, List b, std::vector<double> scaling) {
  const Borrow borrow_of("lora_expand_");
  bridge::lora_expand_(borrow_of("y", y), borrow_of("h", h), borrow_of("B", b), borrow(scaling));
}

std::tuple<Torch, List, List> _lora_backward(
    Torch grad, Maybe x, Maybe h, Maybe weight, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng, bool need_x, bool need_a, bool need_b) {
  const Borrow borrow_of("lora_backward");
  const auto out = bridge::lora_backward({
      .grad = borrow_of("grad", grad),
      .x = borrow_of("x", x),
      .h = borrow_of("h", h),
      .weight = borrow_of("weight", weight),
      .a = borrow_of("A", a),
      .b = borrow_of("B", b),
      .scaling = borrow(scaling),
      .dropout_p = dropout_p,
      .rng = borrow_of("rng", rng),
      .need_x = need_x,
      .need_a = need_a,
      .need_b = need_b,
  });
  const size_t for_a = need_a ? a.size() : 0;
  const size_t for_b = need_b ? b.size() : 0;
  return {out->at(0).torch(), release(*out, 1, for_a), release(*out, 1 + for_a, for_b)};
}

std::tuple<Torch, List, List> lora_backward(
    Torch grad, Torch x, Torch h, Maybe weight, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng) {
  return _lora_backward(
      std::move(grad), std::move(x), std::move(h), std::move(weight), std::move(a), std::move(b),
      std::move(scaling), dropout_p, std::move(rng), true, true, true);
}

std::tuple<Torch, Torch> _lora_experts_apply(
    Torch base, Torch x, Torch ends, List a, List b, std::vector<double> scaling, double dropout_p, Maybe rng) {
  const Borrow borrow_of("lora_experts");
  const auto out = bridge::lora_experts_apply({
      .base = borrow_of("base", base),
      .x = borrow_of("x", x),
      .ends = borrow_of("ends", ends),
      .a = borrow_of("A", a),
      .b = borrow_of("B", b),
      .scaling = borrow(scaling),
      .dropout_p = dropout_p,
      .rng = borrow_of("rng", rng),
  });
  return {out->at(0).torch(), out->at(1).torch()};
}

Torch lora_experts(
    Torch base, Torch x, Torch ends, List a, List b, std::vector<double> scaling, double dropout_p, Maybe rng) {
  return std::get<0>(_lora_experts_apply(
      std::move(base), std::move(x), std::move(ends), std::move(a), std::move(b), std::move(scaling), dropout_p,
      std::move(rng)));
}

std::tuple<Torch, List, List> _lora_experts_backward(
    Torch grad, Maybe x, Maybe h, Torch ends, List a, List b, std::vector<double> scaling, double dropout_p,
    Maybe rng, bool need_x, bool need_a, bool need_b) {
  const Borrow borrow_of("lora_experts");
  const auto out = bridge::lora_experts_backward({
      .grad = borrow_of("grad", grad),
      .x = borrow_of("x", x),
      .h = borrow_of("h", h),
      .ends = borrow_of("ends", ends),
      .a = borrow_of("A", a),
      .b = borrow_of("B", b),
      .scaling = borrow(scaling),
      .dropout_p = dropout_p,
      .rng = borrow_of("rng", rng),
      .need_x = need_x,
      .need_a = need_a,
      .need_b = need_b,
  });
  const size_t for_a = need_a ? a.size() : 0;
  const size_t for_b = need_b ? b.size() : 0;
  return {out->at(0).torch(), release(*out, 1, for_a), release(*out, 1 + for_a, for_b)};
}

void sideband_accumulate_(List sum, Torch stats, List grad, double weight, bool zero_grad) {
  const Borrow borrow_of("sideband_accumulate_");
  bridge::sideband_accumulate_(
      borrow_of("sum", sum), borrow_of("stats", stats), borrow_of("grad", grad), weight, zero_grad);
}

Torch sideband_stats(List sum, Torch stats) {
  const Borrow borrow_of("sideband_stats");
  return bridge::sideband_stats(borrow_of("sum", sum), borrow_of("stats", stats))->at(0).torch();
}

void sideband_drain_(List sum, Torch stats, List grad, double scale) {
  const Borrow borrow_of("sideband_drain_");
  bridge::sideband_drain_(
      borrow_of("sum", sum), borrow_of("stats", stats), borrow_of("grad", grad), scale);
}

Torch buffer_variance(Torch ring, int64_t filled) {
  return bridge::buffer_variance(Borrow("buffer_variance")("ring", ring), filled)->at(0).torch();
}

} // namespace
} // namespace tsugi

// Names with a leading underscore are internal: what the autograd formulas in ops/ call.
STABLE_TORCH_LIBRARY(tsugi, m) {
  m.def("lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p=0.0, Tensor? rng=None) -> Tensor");
  m.def("lora_delta(Tensor base, Tensor x, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p=0.0, Tensor? rng=None) -> Tensor");
  m.def("_lora_apply(Tensor? base, Tensor x, Tensor? weight, Tensor? bias, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p, Tensor? rng) -> (Tensor, Tensor)");
  m.def("lora_shrink(Tensor x, Tensor[] A, float dropout_p=0.0, Tensor? rng=None) -> Tensor");
  m.def("lora_expand_(Tensor(a!) y, Tensor h, Tensor[] B, float[] scaling) -> ()");
  m.def("lora_backward(Tensor grad, Tensor x, Tensor h, Tensor? weight, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p=0.0, Tensor? rng=None) -> (Tensor, Tensor[], Tensor[])");
  m.def("_lora_backward(Tensor grad, Tensor? x, Tensor? h, Tensor? weight, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p, Tensor? rng, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor[], Tensor[])");
  m.def("lora_experts(Tensor base, Tensor x, Tensor ends, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p=0.0, Tensor? rng=None) -> Tensor");
  m.def("_lora_experts_apply(Tensor base, Tensor x, Tensor ends, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p, Tensor? rng) -> (Tensor, Tensor)");
  m.def("_lora_experts_backward(Tensor grad, Tensor? x, Tensor? h, Tensor ends, Tensor[] A, Tensor[] B, float[] scaling, float dropout_p, Tensor? rng, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor[], Tensor[])");
  m.def("sideband_accumulate_(Tensor(a!)[] sum, Tensor(b!) stats, Tensor(c!)[] grad, float weight=1.0, bool zero_grad=False) -> ()");
  m.def("sideband_stats(Tensor[] sum, Tensor stats) -> Tensor");
  m.def("sideband_drain_(Tensor(a!)[] sum, Tensor(b!) stats, Tensor(c!)[] grad, float scale) -> ()");
  m.def("buffer_variance(Tensor ring, int filled) -> Tensor");
}

// An op's adapter has its name.
#define TSUGI_OP(m, name) m.impl(#name, TORCH_BOX(&tsugi::name))

// The same adapters serve both keys: Rust sees where the tensors are.
#define TSUGI_IMPLEMENT(m)             \
  TSUGI_OP(m, lora_linear);            \
  TSUGI_OP(m, lora_delta);             \
  TSUGI_OP(m, _lora_apply);            \
  TSUGI_OP(m, lora_shrink);            \
  TSUGI_OP(m, lora_expand_);           \
  TSUGI_OP(m, lora_backward);          \
  TSUGI_OP(m, _lora_backward);         \
  TSUGI_OP(m, lora_experts);           \
  TSUGI_OP(m, _lora_experts_apply);    \
  TSUGI_OP(m, _lora_experts_backward); \
  TSUGI_OP(m, sideband_accumulate_);   \
  TSUGI_OP(m, sideband_stats);         \
  TSUGI_OP(m, sideband_drain_);        \
  TSUGI_OP(m, buffer_variance);

STABLE_TORCH_LIBRARY_IMPL(tsugi, CPU, m) {
  TSUGI_IMPLEMENT(m)
}

#ifdef TSUGI_CUDA
STABLE_TORCH_LIBRARY_IMPL(tsugi, CUDA, m) {
  TSUGI_IMPLEMENT(m)
}
#endif
