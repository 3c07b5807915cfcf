// Torch as Rust sees it: a borrowed tensor's facts, allocation, dense products, threads.
// Only torch's stable ABI and C shim are used, so one binary serves every torch from 2.11 on.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "rust/cxx.h"

namespace tsugi {

// A torch tensor as Rust sees it; holds a reference to it for as long as it lives. All facts are read by the constructor,
// which throws a sentence that names the op and the argument where there is nothing to read, so no accessor can throw.
class Tensor {
 public:
  Tensor(const char* op, std::string name, torch::stable::Tensor tensor);

  // The argument's name in the op's schema, "A[1]" in a list.
  const std::string& name() const noexcept {
    return name_;
  }
  // The first element's address; null where the tensor has no memory.
  const uint8_t* data() const noexcept {
    return data_;
  }
  rust::Slice<const int64_t> sizes() const noexcept {
    return {sizes_, dimensions_};
  }
  rust::Slice<const int64_t> strides() const noexcept {
    return {strides_, dimensions_};
  }
  // Torch's codes; not converted to the enumerations of its headers, which throws for types that they do not know.
  int32_t dtype() const noexcept {
    return dtype_;
  }
  int32_t device_type() const noexcept {
    return device_type_;
  }
  int32_t device_index() const noexcept {
    return device_index_;
  }
  // Where the first element lies in the storage, in elements, and the storage's size in bytes.
  int64_t storage_offset() const noexcept {
    return storage_offset_;
  }
  int64_t storage_bytes() const noexcept {
    return storage_bytes_;
  }
  const torch::stable::Tensor& torch() const noexcept {
    return tensor_;
  }

 private:
  std::string name_;
  torch::stable::Tensor tensor_;
  const uint8_t* data_ = nullptr;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  size_t dimensions_ = 0;
  int32_t dtype_ = 0;
  int32_t device_type_ = 0;
  int32_t device_index_ = 0;
  int64_t storage_offset_ = 0;
  int64_t storage_bytes_ = 0;
};

// A new uninitialised contiguous tensor on `like`'s device; `dtype` is torch's scalar type code.
std::unique_ptr<Tensor> empty(rust::Slice<const int64_t> sizes, int32_t dtype, const Tensor& like);
// The same with these strides.
std::unique_ptr<Tensor> empty_strided(
    rust::Slice<const int64_t> sizes, rust::Slice<const int64_t> strides, int32_t dtype, const Tensor& like);
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

// Whether this process is the child of a fork: torch's threads and what they hold stayed with the parent.
bool forked() noexcept;

// Torch's current stream on a CUDA device, as a cudaStream_t.
size_t cuda_stream(int32_t device);

} // namespace tsugi
