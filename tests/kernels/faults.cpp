// Proves each detector of the executor with a kernel that has the fault. Out-of-bounds access ends the process under
// AddressSanitizer, so those two are run by name: `faults shared_bounds`, `faults global_bounds`.
#include "harness.h"

using namespace tsugi;

namespace {

constexpr unsigned THREADS = 64;

using Kernel = void (*)(float* out, const float* in);

void sound(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  DYNAMIC_SHARED(dynamic);
  cp_async_16(dynamic + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  cp_async_commit();
  s[threadIdx.x] = in[threadIdx.x];
  cp_async_wait<0>();
  __syncthreads();
  const float* row = reinterpret_cast<const float*>(dynamic) + 4 * ((threadIdx.x + 1) % THREADS);
  const float v = __shfl_xor_sync(0xffffffffu, s[(threadIdx.x + 1) % THREADS], 3);
  __syncwarp();
  out[blockIdx.x * THREADS + threadIdx.x] = v + row[1];
}

void barrier_not_reached(float* out, const float* in) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

void barrier_elsewhere(float* out, const float* in) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

void returned_before_barrier(float* out, const float* in) {
  if (threadIdx.x == 63) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

void lane_missing(float* out, const float* in) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 != 5) v = __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

void lanes_apart(float* out, const float* in) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  } else {
    v = __shfl_xor_sync(0xffffffffu, v, 2);
  }
  out[threadIdx.x] = v;
}

void static_never_written(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  if (threadIdx.x != 7) s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

void dynamic_never_written(float* out, const float* in) {
  DYNAMIC_SHARED(dynamic);
  float* s = reinterpret_cast<float*>(dynamic);
  if (threadIdx.x != 7) s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

// What the block before left in shared memory is not the next block's to read.
void left_by_another_block(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  if (blockIdx.x == 0) s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * THREADS + threadIdx.x] = s[threadIdx.x];
}

void race_between_threads(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[(threadIdx.x + 1) % THREADS];
}

// Every warp has the same shuffles to wait in, so warps that advance side by side never meet.
void race_between_warps(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  s[threadIdx.x] = in[threadIdx.x];
  float v = in[threadIdx.x];
  for (int i = 1; i < 32; i *= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  out[threadIdx.x] = v + s[(threadIdx.x + 32) % THREADS];
}

// Read after write is guarded, but the next write is not.
void race_on_reuse(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[threadIdx.x] = in[threadIdx.x + i];
    __syncthreads();
    sum += s[THREADS - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

void race_between_blocks(float* out, const float* in) {
  if (blockIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
  if (blockIdx.x == 1) out[threadIdx.x] += 1.0f;
}

void copy_read_too_early(float* out, const float* in) {
  DYNAMIC_SHARED(dynamic);
  cp_async_16(dynamic + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<const float*>(dynamic)[threadIdx.x];
  cp_async_wait<0>();
}

// Its own copy has landed; another thread's has not been waited for by that thread before the barrier.
void copy_without_barrier(float* out, const float* in) {
  DYNAMIC_SHARED(dynamic);
  cp_async_16(dynamic + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = reinterpret_cast<const float*>(dynamic)[4 * ((threadIdx.x + 1) % THREADS)];
}

void copy_never_waited_for(float* out, const float* in) {
  DYNAMIC_SHARED(dynamic);
  cp_async_16(dynamic + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  cp_async_commit();
  out[threadIdx.x] = in[threadIdx.x];
}

void misaligned_load(float* out, const float* in) { out[threadIdx.x] = bits_float(load_16(in + 1).x); }

void shared_bounds(float* out, const float* in) {
  SHARED_ARRAY(float, s, 64);
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

void global_bounds(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x + 4 * THREADS - 63]; }

std::string run(Kernel kernel) {
  std::vector<float> in(4 * THREADS), out(2 * THREADS);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i) * 0.5f + 1.0f;
  return harness::fault_of({{out.data(), out.size() * sizeof(float)}}, [&](int seed) {
    return simt::launch({2}, {THREADS}, 16 * THREADS, seed, [&] { kernel(out.data(), in.data()); });
  });
}

void expect(Kernel kernel, const char* name, const std::string& words) {
  const std::string fault = run(kernel);
  const bool ok = words.empty() ? fault.empty() : fault.find(words) != std::string::npos;
  harness::report(ok, std::string(name) + ": \"" + fault + "\", expected \"" + words + "\"");
}
#define EXPECT(kernel, words) expect(kernel, #kernel, words)

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "shared_bounds") return run(shared_bounds).empty() ? 0 : 1;
  if (argc == 2 && std::string(argv[1]) == "global_bounds") return run(global_bounds).empty() ? 0 : 1;
  EXPECT(sound, "");
  EXPECT(barrier_not_reached, "was not reached by all threads: 40 of 64 wait, 24 returned");
  EXPECT(barrier_elsewhere, "others wait elsewhere");
  EXPECT(returned_before_barrier, "was not reached by all threads: 63 of 64 wait, 1 returned");
  EXPECT(lane_missing, "was not reached by all lanes");
  EXPECT(lanes_apart, "while other lanes of the warp wait in __shfl_xor_sync");
  EXPECT(static_never_written, "memory that nobody wrote");
  EXPECT(dynamic_never_written, "memory that nobody wrote");
  EXPECT(left_by_another_block, "memory that nobody wrote");
  EXPECT(race_between_threads, "the order of the threads");
  EXPECT(race_between_warps, "the order of the threads");
  EXPECT(race_on_reuse, "the order of the threads");
  EXPECT(race_between_blocks, "the order of the threads");
  EXPECT(copy_read_too_early, "memory that nobody wrote");
  EXPECT(copy_without_barrier, "memory that nobody wrote");
  EXPECT(copy_never_waited_for, "before its cp.async had been waited for");
  EXPECT(misaligned_load, "not a multiple of its size");
  return harness::finish("faults");
}
