// What Rust may ask of torch: a borrowed tensor's facts, allocation, dense products, threads.
// Only torch's stable ABI and C shim are used, so one binary serves every torch from 2.11 on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "rust/cxx.h"

namespace tsugi {

// A torch tensor as Rust sees it; holds a reference to it for as long as it lives.
class Tensor {
 public:
  explicit Tensor(torch::stable::Tensor tensor) : tensor_(std::move(tensor)) {}

  const uint8_t* data() const {
    return static_cast<const uint8_t*>(tensor_.data_ptr());
  }
  rust::Slice<const int64_t> sizes() const {
    auto sizes = tensor_.sizes();
    return {sizes.data(), sizes.size()};
  }
  rust::Slice<const int64_t> strides() const {
    auto strides = tensor_.strides();
    return {strides.data(), strides.size()};
  }
  int32_t dtype() const {
    return static_cast<int32_t>(tensor_.scalar_type());
  }
  int32_t device_type() const;
  int32_t device_index() const {
    return tensor_.get_device_index();
  }
  const torch::stable::Tensor& torch() const {
    return tensor_;
  }

 private:
  torch::stable::Tensor tensor_;
};

// A new uninitialised contiguous tensor on `like`'s device; `dtype` is torch's scalar type code.
std::unique_ptr<Tensor> empty(rust::Slice<const int64_t> sizes, int32_t dtype, const Tensor& like);
std::unique_ptr<Tensor> contiguous(const Tensor& tensor);
void copy_(const Tensor& destination, const Tensor& source);
void zero_(const Tensor& tensor);

std::unique_ptr<std::vector<Tensor>> list();
void push(std::vector<Tensor>& list, std::unique_ptr<Tensor> tensor);

// out = beta out + alpha a b, all of one dtype and on one device, out [m, n], a [m, k], b [k, n], strides in
// elements. The memory behind the addresses is the caller's.
struct Matrix;
void dense_product(const Matrix& out, double beta, double alpha, const Matrix& a, const Matrix& b);

// body(begin, end, context) over pieces of [0, n) of at least `grain`, on torch's threads.
void parallel_for(int64_t n, int64_t grain, size_t context, rust::Fn<void(int64_t, int64_t, size_t)> body);
uint32_t num_threads();

// Torch's current stream on a CUDA device, as a cudaStream_t.
size_t cuda_stream(int32_t device);

} // namespace tsugi
