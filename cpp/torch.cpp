// Torch's services for Rust, through its stable ABI and C shim: torch.h, implemented.

#include "tsugi-kpool/cpp/torch.h"

#include <array>
#include <stdexcept>
#include <string>

#include <dlfcn.h>
#include <pthread.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include "tsugi-kpool/src/torch.rs.h"

namespace tsugi {

using Torch = torch::stable::Tensor;

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
  return std::make_unique<Tensor>("empty_strided", like.name(), torch::stable::Tensor(handle));
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

} // namespace tsugi
