// The native API of torch.ops.tsugi: one table of schemas, one table of implementations, and between
// them adapters that hand borrowed tensors to Rust.

#include "tsugi-kpool/cpp/ops.h"

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <dlfcn.h>
#include <pthread.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tsugi-kpool/src/bridge.rs.h"

namespace tsugi {

using Torch = torch::stable::Tensor;
using List = std::vector<Torch>;
using Maybe = std::optional<Torch>;

Tensor::Tensor(const char* op, std::string name, Torch tensor) : name_(std::move(name)), tensor_(std::move(tensor)) {
  const auto refuse = [&](const char* what) {
    throw std::runtime_error(std::string(op) + ": " + name_ + " " + what);
  };
  if (!tensor_.defined()) {
    refuse("is None; it must be a tensor");
  }
  const AtenTensorHandle handle = tensor_.get();
  int32_t layout = 0;
  if (aoti_torch_get_layout(handle, &layout) || layout != aoti_torch_layout_strided()) {
    refuse("is sparse, nested or in an opaque layout; it must be a strided tensor, as to_dense() returns");
  }
  int64_t dimensions = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  void* data = nullptr;
  if (aoti_torch_get_dtype(handle, &dtype_) || aoti_torch_get_device_type(handle, &device_type_) ||
      aoti_torch_get_device_index(handle, &device_index_) || aoti_torch_get_dim(handle, &dimensions) ||
      aoti_torch_get_sizes(handle, &sizes) || aoti_torch_get_strides(handle, &strides) ||
      aoti_torch_get_storage_offset(handle, &storage_offset_) || aoti_torch_get_storage_size(handle, &storage_bytes_) ||
      aoti_torch_get_data_ptr(handle, &data)) {
    refuse("has no memory of its own that an operation could read; it must be a plain strided tensor");
  }
  sizes_ = sizes;
  strides_ = strides;
  dimensions_ = static_cast<size_t>(dimensions);
  data_ = static_cast<const uint8_t*>(data);
}

std::unique_ptr<Tensor> empty(rust::Slice<const int64_t> sizes, int32_t dtype, const Tensor& like) {
  return std::make_unique<Tensor>(
      "empty",
      like.name(),
      torch::stable::empty(
          {sizes.data(), sizes.size()},
          static_cast<torch::headeronly::ScalarType>(dtype),
          std::nullopt,
          like.torch().device()));
}

std::unique_ptr<Tensor> empty_strided(
    rust::Slice<const int64_t> sizes, rust::Slice<const int64_t> strides, int32_t dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, like.device_type(), like.device_index(),
      &handle));
  return std::make_unique<Tensor>("empty_strided", like.name(), Torch(handle));
}

void copy_(const Tensor& destination, const Tensor& source) {
  Torch target = destination.torch();
  torch::stable::copy_(target, source.torch());
}

void zero_(const Tensor& tensor) {
  Torch target = tensor.torch();
  torch::stable::zero_(target);
}

std::unique_ptr<std::vector<Tensor>> list() {
  return std::make_unique<std::vector<Tensor>>();
}

void push(std::vector<Tensor>& list, std::unique_ptr<Tensor> tensor) {
  list.push_back(std::move(*tensor));
}

namespace {

// A tensor over memory that is borrowed for one call.
class Borrowed {
 public:
  explicit Borrowed(const Matrix& matrix) {
    const std::array<int64_t, 2> sizes{matrix.rows, matrix.cols};
    const std::array<int64_t, 2> strides{matrix.row_stride, matrix.col_stride};
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        reinterpret_cast<void*>(matrix.data), 2, sizes.data(), strides.data(), 0, matrix.dtype,
        matrix.device < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
        matrix.device < 0 ? 0 : matrix.device, &handle_));
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const {
    return handle_;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// A function of torch's CUDA half, which is in the process if a tensor is on such a device. Nothing links to it, so that
// one binary serves torch with CUDA and without.
template <class Function>
Function cuda_function(const char* name) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const function = library ? dlsym(library, name) : nullptr;
  if (!function) {
    throw std::runtime_error(std::string("this torch has no ") + name);
  }
  return reinterpret_cast<Function>(function);
}

using AddmmOut = AOTITorchError (*)(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);

} // namespace

size_t cuda_stream(int32_t device) {
  using Current = AOTITorchError (*)(int32_t, void**);
  static const auto current = cuda_function<Current>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(device, &stream));
  return reinterpret_cast<size_t>(stream);
}

void dense_product(const Matrix& out, double beta, double alpha, const Matrix& a, const Matrix& b) {
  const Borrowed y(out), left(a), right(b);
  if (out.device >= 0) {
    static const auto addmm_out = cuda_function<AddmmOut>("aoti_torch_cuda_addmm_out");
    TORCH_ERROR_CODE_CHECK(addmm_out(y.get(), y.get(), left.get(), right.get(), beta, alpha));
  } else if (beta == 0.0 && alpha == 1.0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), left.get(), right.get()));
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(y.get(), y.get(), left.get(), right.get(), beta, alpha));
  }
}

void parallel_for(int64_t n, int64_t grain, size_t context, rust::Fn<void(int64_t, int64_t, size_t)> body) {
  torch::stable::parallel_for(
      0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

uint32_t num_threads() {
  return torch::stable::get_num_threads();
}

namespace {

bool is_forked = false;
// Set in the child by fork itself, so that asking costs nothing.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

} // namespace

bool forked() noexcept {
  return is_forked;
}

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

std::tuple<Torch, Torch> apply(
    Maybe base, Torch x, Maybe weight, Maybe bias, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng) {
  const Borrow borrow_of(weight ? "lora_linear" : "lora_delta");
  auto out = lora_apply(
      borrow_of("base", base), borrow_of("x", x), borrow_of("weight", weight), borrow_of("bias", bias),
      borrow_of("A", a), borrow_of("B", b), borrow(scaling), dropout_p, borrow_of("rng", rng));
  return {out->at(0).torch(), out->at(1).torch()};
}

Torch linear(
    Torch x, Torch weight, Maybe bias, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng) {
  return std::get<0>(apply(
      std::nullopt, std::move(x), std::move(weight), std::move(bias), std::move(a), std::move(b),
      std::move(scaling), dropout_p, std::move(rng)));
}

Torch delta(
    Torch base, Torch x, List a, List b, std::vector<double> scaling, double dropout_p, Maybe rng) {
  return std::get<0>(apply(
      std::move(base), std::move(x), std::nullopt, std::nullopt, std::move(a), std::move(b),
      std::move(scaling), dropout_p, std::move(rng)));
}

Torch shrink(Torch x, List a, double dropout_p, Maybe rng) {
  const Borrow borrow_of("lora_shrink");
  return lora_shrink(borrow_of("x", x), borrow_of("A", a), dropout_p, borrow_of("rng", rng))->at(0).torch();
}

void expand_(Torch y, Torch h, List b, std::vector<double> scaling) {
  const Borrow borrow_of("lora_expand_");
  lora_expand_(borrow_of("y", y), borrow_of("h", h), borrow_of("B", b), borrow(scaling));
}

std::tuple<Torch, List, List> backward_of(
    Torch grad, Maybe x, Maybe h, Maybe weight, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng, bool need_x, bool need_a, bool need_b) {
  const Borrow borrow_of("lora_backward");
  auto out = lora_backward(
      borrow_of("grad", grad), borrow_of("x", x), borrow_of("h", h), borrow_of("weight", weight),
      borrow_of("A", a), borrow_of("B", b), borrow(scaling), dropout_p, borrow_of("rng", rng), need_x, need_a, need_b);
  const size_t for_a = need_a ? a.size() : 0;
  const size_t for_b = need_b ? b.size() : 0;
  return {out->at(0).torch(), release(*out, 1, for_a), release(*out, 1 + for_a, for_b)};
}

std::tuple<Torch, List, List> backward(
    Torch grad, Torch x, Torch h, Maybe weight, List a, List b, std::vector<double> scaling,
    double dropout_p, Maybe rng) {
  return backward_of(
      std::move(grad), std::move(x), std::move(h), std::move(weight), std::move(a), std::move(b),
      std::move(scaling), dropout_p, std::move(rng), true, true, true);
}

std::tuple<Torch, Torch> experts_apply(
    Torch base, Torch x, Torch ends, List a, List b, std::vector<double> scaling, double dropout_p, Maybe rng) {
  const Borrow borrow_of("lora_experts");
  auto out = lora_experts_apply(
      borrow_of("base", base), borrow_of("x", x), borrow_of("ends", ends), borrow_of("A", a), borrow_of("B", b),
      borrow(scaling), dropout_p, borrow_of("rng", rng));
  return {out->at(0).torch(), out->at(1).torch()};
}

Torch experts(
    Torch base, Torch x, Torch ends, List a, List b, std::vector<double> scaling, double dropout_p, Maybe rng) {
  return std::get<0>(experts_apply(
      std::move(base), std::move(x), std::move(ends), std::move(a), std::move(b), std::move(scaling), dropout_p,
      std::move(rng)));
}

std::tuple<Torch, List, List> experts_backward(
    Torch grad, Maybe x, Maybe h, Torch ends, List a, List b, std::vector<double> scaling, double dropout_p,
    Maybe rng, bool need_x, bool need_a, bool need_b) {
  const Borrow borrow_of("lora_experts");
  auto out = lora_experts_backward(
      borrow_of("grad", grad), borrow_of("x", x), borrow_of("h", h), borrow_of("ends", ends), borrow_of("A", a),
      borrow_of("B", b), borrow(scaling), dropout_p, borrow_of("rng", rng), need_x, need_a, need_b);
  const size_t for_a = need_a ? a.size() : 0;
  const size_t for_b = need_b ? b.size() : 0;
  return {out->at(0).torch(), release(*out, 1, for_a), release(*out, 1 + for_a, for_b)};
}

void accumulate_(List sum, Torch stats, List grad, double weight, bool zero_grad) {
  const Borrow borrow_of("sideband_accumulate_");
  sideband_accumulate_(
      borrow_of("sum", sum), borrow_of("stats", stats), borrow_of("grad", grad), weight, zero_grad);
}

Torch statistics(List sum, Torch stats) {
  const Borrow borrow_of("sideband_stats");
  return sideband_stats(borrow_of("sum", sum), borrow_of("stats", stats))->at(0).torch();
}

void drain_(List sum, Torch stats, List grad, double scale) {
  const Borrow borrow_of("sideband_drain_");
  sideband_drain_(borrow_of("sum", sum), borrow_of("stats", stats), borrow_of("grad", grad), scale);
}

Torch variance(Torch ring, int64_t filled) {
  return buffer_variance(Borrow("buffer_variance")("ring", ring), filled)->at(0).torch();
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

// The same adapters serve both keys: Rust sees where the tensors are.
#define TSUGI_IMPLEMENT(m)                                             \
  m.impl("lora_linear", TORCH_BOX(&tsugi::linear));                    \
  m.impl("lora_delta", TORCH_BOX(&tsugi::delta));                      \
  m.impl("_lora_apply", TORCH_BOX(&tsugi::apply));                     \
  m.impl("lora_shrink", TORCH_BOX(&tsugi::shrink));                    \
  m.impl("lora_expand_", TORCH_BOX(&tsugi::expand_));                  \
  m.impl("lora_backward", TORCH_BOX(&tsugi::backward));                \
  m.impl("_lora_backward", TORCH_BOX(&tsugi::backward_of));            \
  m.impl("lora_experts", TORCH_BOX(&tsugi::experts));                  \
  m.impl("_lora_experts_apply", TORCH_BOX(&tsugi::experts_apply));     \
  m.impl("_lora_experts_backward", TORCH_BOX(&tsugi::experts_backward)); \
  m.impl("sideband_accumulate_", TORCH_BOX(&tsugi::accumulate_));      \
  m.impl("sideband_stats", TORCH_BOX(&tsugi::statistics));             \
  m.impl("sideband_drain_", TORCH_BOX(&tsugi::drain_));                \
  m.impl("buffer_variance", TORCH_BOX(&tsugi::variance));

STABLE_TORCH_LIBRARY_IMPL(tsugi, CPU, m) {
  TSUGI_IMPLEMENT(m)
}

#ifdef TSUGI_CUDA
STABLE_TORCH_LIBRARY_IMPL(tsugi, CUDA, m) {
  TSUGI_IMPLEMENT(m)
}
#endif
