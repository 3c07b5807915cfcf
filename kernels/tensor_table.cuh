// The tensors of one adapter, by value in the parameters of a launch, cut into chunks that blocks take in turn.
#pragma once

#include "common.cuh"

namespace tsugi {

constexpr int TABLE_TENSORS = 512;
constexpr int TABLE_CHUNK = 4096;
constexpr int TABLE_THREADS = 256;

// The fields of stats, float64 [8]; the last three are room.
enum StatsField { STATS_M, STATS_N, STATS_N2, STATS_Q, STATS_NONFINITE, STATS_FIELDS = 8 };

// 12 KB of kernel parameters: more than 4 KB needs a driver of CUDA 12.1, and this code object needs one of 13.0.
// A table in the parameters is copied with the launch: nothing to upload, and a captured graph keeps its own.
struct TensorTable {
  void* sum[TABLE_TENSORS];   // fp32
  void* grad[TABLE_TENSORS];  // null where the kernel takes no gradient
  long long first_chunk[TABLE_TENSORS + 1];
  long long numel[TABLE_TENSORS];
  int count;

  TSUGI_DEVICE int of(long long chunk) const {
    int low = 0, high = count - 1;  // the last tensor whose first chunk is not beyond this one
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  TSUGI_DEVICE long long chunks() const { return first_chunk[count]; }
};

// Calls f(tensor, element, valid) for every eight elements of this block's chunks, in a fixed order.
template <class F>
TSUGI_DEVICE void each_eight(const TensorTable& table, F&& f) {
  for (long long chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int tensor = table.of(chunk);
    const long long begin = (chunk - table.first_chunk[tensor]) * TABLE_CHUNK, numel = table.numel[tensor];
#pragma unroll
    for (int i = 0; i < TABLE_CHUNK / (8 * TABLE_THREADS); ++i) {
      const long long at = begin + (static_cast<long long>(i) * TABLE_THREADS + threadIdx.x) * 8;
      if (at < numel) f(tensor, at, numel - at);
    }
  }
}

TSUGI_DEVICE bool aligned_pointer(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

}  // namespace tsugi
