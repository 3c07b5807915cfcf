// The host executor: runs the CUDA kernels of this directory on a CPU, one block after another, one fiber a thread.
//
// A kernel file includes common.cuh, which includes this header where the compiler is not nvcc. The same source then
// runs under `simt::launch`, which looks for what a checker on a device would look for:
//
//   a barrier that not all threads reach        every thread must arrive, at the same line; a thread that returned does not count
//   a warp collective that lanes do not share   all lanes of the mask, at the same line
//   shared memory read before it was written    poison that differs between runs; also the target of a pending cp.async
//   races between barriers                      several thread and block orders; the harness compares the results bit by bit
//   out-of-bounds access                        AddressSanitizer: shared arrays and test buffers have their own redzones
//   misaligned vector access, lost cp.async     checked in the wrappers
//
// A fault ends the launch and is returned as a sentence. Kernels own nothing, so abandoning their stacks leaks nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

struct Site {
  const char* file;
  int line;
};

struct PendingCopy {
  void* dst;
  const void* src;
  int bytes;  // of 16; the rest becomes zero
  int group;
};

enum class State { ready, barrier, collective, done };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  State state = State::done;
  Site site{};
  std::vector<PendingCopy> copies;
  int group = 0;  // cp.async groups committed so far
#if !defined(__x86_64__)
  ucontext_t context;
#endif
#ifdef SIMT_ASAN
  void* fake_stack = nullptr;
#endif
};

struct Warp {
  unsigned arrived = 0, mask = 0;
  const char* what = nullptr;
  Site site{};
  void* lane[32] = {};
};

struct SharedSpan {
  void* at;
  size_t bytes;
};

constexpr size_t STACK_BYTES = 256 * 1024;

struct Executor {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<SharedSpan> static_shared;  // every SHARED_ARRAY that was ever reached
  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  unsigned current = 0;
  unsigned threads = 0;
  std::string fault;
  std::function<void()> body;
  unsigned char poison = 0xff;
  uint64_t random = 0;
#if !defined(__x86_64__)
  ucontext_t scheduler_context;
#endif
  void* scheduler_sp = nullptr;
#ifdef SIMT_ASAN
  void* scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};
inline Executor exec;

inline uint64_t next_random() {
  uint64_t z = (exec.random += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack and continues on another one.
__attribute__((naked, noinline)) static void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void to_scheduler(bool for_good) {
  Fiber& me = exec.fibers[exec.current];
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake_stack, exec.scheduler_bottom, exec.scheduler_size);
#else
  (void)for_good;
#endif
#if defined(__x86_64__)
  switch_stack(&me.sp, exec.scheduler_sp);
#else
  swapcontext(&me.context, &exec.scheduler_context);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
}

inline void fail(std::string message) {
  if (exec.fault.empty()) {
    exec.fault = std::move(message) + " (thread " + std::to_string(exec.current) + " of block " + std::to_string(blockIdx.x) +
                 "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ")";
  }
  to_scheduler(false);
  abort();  // a faulted launch never resumes a thread
}

inline std::string where(const Site& s) {
  const char* base = strrchr(s.file, '/');
  return std::string(base ? base + 1 : s.file) + ":" + std::to_string(s.line);
}

inline void fiber_main() {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &exec.scheduler_bottom, &exec.scheduler_size);
#endif
  exec.body();
  Fiber& me = exec.fibers[exec.current];
  if (!me.copies.empty()) fail("a thread returned before its cp.async had been waited for");
  me.state = State::done;
  to_scheduler(true);
  abort();
}

inline void prepare(Fiber& f) {
  const size_t page = 4096;
  if (!f.stack) {
    void* at = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    mprotect(at, page, PROT_NONE);  // a kernel that overflows its stack stops here
    f.stack = static_cast<char*>(at) + page;
  }
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(f.stack, STACK_BYTES);
  f.fake_stack = nullptr;
#endif
  f.state = State::ready;
  f.copies.clear();
  f.group = 0;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + STACK_BYTES);
  *--top = nullptr;  // keeps rsp + 8 a multiple of 16 on entry, as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = STACK_BYTES;
  f.context.uc_link = nullptr;
  makecontext(&f.context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

inline void resume(unsigned tid) {
  Fiber& f = exec.fibers[tid];
  exec.current = tid;
  threadIdx = dim3(tid % blockDim.x, tid / blockDim.x % blockDim.y, tid / (blockDim.x * blockDim.y));
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&exec.scheduler_fake, f.stack, STACK_BYTES);
#endif
#if defined(__x86_64__)
  switch_stack(&exec.scheduler_sp, f.sp);
#else
  swapcontext(&exec.scheduler_context, &f.context);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(exec.scheduler_fake, nullptr, nullptr);
#endif
}

template <class T>
inline void reorder(std::vector<T>& order, int seed) {
  const size_t n = order.size();
  if (seed == 0) return;
  if (seed == 1) {
    for (size_t i = 0; i < n / 2; ++i) std::swap(order[i], order[n - 1 - i]);
    return;
  }
  for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

// Runs every thread that can run, once. True if there was one.
inline bool sweep(const std::vector<unsigned>& threads) {
  bool progress = false;
  for (unsigned tid : threads) {
    if (exec.fibers[tid].state != State::ready) continue;
    progress = true;
    resume(tid);
    if (!exec.fault.empty()) return false;
  }
  return progress;
}

// After the calling fiber changed its state: let the others run until it is ready again.
inline void block_here() { to_scheduler(false); }

inline void run_block(int seed) {
  const unsigned n = exec.threads;
  for (unsigned i = 0; i < n; ++i) prepare(exec.fibers[i]);
  for (auto& w : exec.warps) w = Warp{};
  for (auto& s : exec.static_shared) memset(s.at, exec.poison, s.bytes);
  if (exec.dynamic_bytes) memset(exec.dynamic_shared, exec.poison, exec.dynamic_bytes);
  // Groups of threads, each run as far as it goes before the next. Under seed 0 the block is one group and its warps advance
  // side by side; else each warp is a group, so that warps are as far apart as the barriers between them let them be.
  std::vector<std::vector<unsigned>> groups;
  for (unsigned i = 0; i < n; ++i) {
    if (i == 0 || (seed != 0 && i % 32 == 0)) groups.emplace_back();
    groups.back().push_back(i);
  }
  auto shuffle = [&] {
    reorder(groups, seed);
    for (auto& group : groups) reorder(group, seed);
  };
  shuffle();
  for (;;) {
    for (const auto& group : groups) {
      while (sweep(group)) {
      }
      if (!exec.fault.empty()) return;
    }
    unsigned done = 0, waiting = 0, stuck = n;
    const Site* first = nullptr;
    bool same = true;
    for (unsigned i = 0; i < n; ++i) {
      const Fiber& f = exec.fibers[i];
      if (f.state == State::done) ++done;
      if (f.state == State::collective) stuck = i;
      if (f.state == State::barrier) {
        ++waiting;
        if (!first) first = &f.site;
        same = same && f.site.line == first->line && f.site.file == first->file;
      }
    }
    if (done == n) return;
    if (stuck != n) {
      const Warp& w = exec.warps[stuck / 32];
      exec.fault = std::string(w.what) + " at " + where(w.site) + " was not reached by all lanes of its mask (block " +
                   std::to_string(blockIdx.x) + ", warp " + std::to_string(stuck / 32) + ")";
      return;
    }
    if (waiting != n || !same) {
      exec.fault = "the barrier at " + where(*first) + " was not reached by all threads: " + std::to_string(waiting) + " of " +
                   std::to_string(n) + " wait, " + std::to_string(done) + " returned" + (same ? "" : ", others wait elsewhere");
      return;
    }
    for (unsigned i = 0; i < n; ++i) exec.fibers[i].state = State::ready;
    shuffle();
  }
}

// Runs the grid once under one thread order and one poison. Returns the fault, or an empty string.
// seed 0: threads and blocks in order, warps side by side; 1: backwards, a warp at a time; else at random, a warp at a time.
inline std::string launch(dim3 grid, dim3 block, size_t shared_bytes, int seed, std::function<void()> body) {
  exec.threads = block.x * block.y * block.z;
  if (exec.threads == 0 || exec.threads > 1024) return "a block has 1 to 1024 threads, not " + std::to_string(exec.threads);
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return "an empty grid";
  if (grid.y > 65535 || grid.z > 65535) return "a grid has at most 65535 blocks along y and z";
  if (exec.fibers.size() < exec.threads) exec.fibers.resize(exec.threads);
  exec.warps.assign((exec.threads + 31) / 32, Warp{});
  exec.fault.clear();
  exec.body = std::move(body);
  exec.random = 0x1234567 + static_cast<uint64_t>(seed);
  exec.poison = seed % 2 == 0 ? 0xff : 0x4b;  // NaN and -1, or large numbers
  exec.dynamic_bytes = shared_bytes;
  exec.dynamic_shared =
      shared_bytes ? static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t(128))) : nullptr;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> order(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  reorder(order, seed);
  for (unsigned b : order) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(seed);
    if (!exec.fault.empty()) break;
  }
  if (exec.dynamic_shared) ::operator delete(exec.dynamic_shared, std::align_val_t(128));
  exec.dynamic_shared = nullptr;
  return exec.fault;
}

inline void barrier(Site site) {
  Fiber& me = exec.fibers[exec.current];
  me.state = State::barrier;
  me.site = site;
  block_here();
}

// Every lane of the mask brings a pointer to its arguments; the last to arrive runs the operation for all of them.
template <class Args>
inline void collective(unsigned mask, const char* what, Site site, Args* mine, void (*run)(Args** lanes, unsigned mask)) {
  const unsigned lane = exec.current % 32;
  Warp& w = exec.warps[exec.current / 32];
  const unsigned in_block = exec.threads - exec.current / 32 * 32;
  const unsigned live = in_block >= 32 ? 0xffffffffu : (1u << in_block) - 1;
  mask &= live;
  if (!(mask >> lane & 1)) fail(std::string(what) + " at " + where(site) + " by a lane outside its own mask");
  if (w.arrived == 0) {
    w.mask = mask;
    w.what = what;
    w.site = site;
  } else if (w.mask != mask || w.what != what || w.site.line != site.line || w.site.file != site.file) {
    fail(std::string(what) + " at " + where(site) + " while other lanes of the warp wait in " + w.what + " at " + where(w.site));
  }
  w.lane[lane] = mine;
  w.arrived |= 1u << lane;
  if (w.arrived != mask) {
    exec.fibers[exec.current].state = State::collective;
    exec.fibers[exec.current].site = site;
    block_here();
    return;
  }
  Args* lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Args*>(w.lane[i]);
  run(lanes, mask);
  const unsigned base = exec.current / 32 * 32;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && i != lane) exec.fibers[base + i].state = State::ready;
  }
  w.arrived = 0;
}

template <class T>
struct Exchange {
  T value, result;
  int source;
};

template <class T>
inline T shuffle(unsigned mask, T value, int source, const char* what, Site site) {
  Exchange<T> mine{value, value, source};
  collective<Exchange<T>>(mask, what, site, &mine, [](Exchange<T>** lanes, unsigned m) {
    for (int i = 0; i < 32; ++i) {
      if (!(m >> i & 1)) continue;
      const int from = lanes[i]->source;
      if (from >= 0 && from < 32 && (m >> from & 1)) lanes[i]->result = lanes[from]->value;
    }
  });
  return mine.result;
}

inline unsigned ballot(unsigned mask, bool vote, const char* what, Site site) {
  Exchange<unsigned> mine{vote ? 1u : 0u, 0u, 0};
  collective<Exchange<unsigned>>(mask, what, site, &mine, [](Exchange<unsigned>** lanes, unsigned m) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) {
      if ((m >> i & 1) && lanes[i]->value) bits |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (m >> i & 1) lanes[i]->result = bits;
    }
  });
  return mine.result;
}

inline void sync_warp(unsigned mask, Site site) {
  int mine = 0;
  collective<int>(mask, "__syncwarp", site, &mine, [](int**, unsigned) {});
}

inline int lane_id() { return static_cast<int>(exec.current % 32); }

// A static shared array: its own allocation, so that AddressSanitizer surrounds it, poisoned before every block.
template <class T, int N, int ID>
inline T* static_shared() {
  static T* storage = nullptr;
  if (!storage) {
    storage = static_cast<T*>(::operator new(sizeof(T) * N, std::align_val_t(128)));
    exec.static_shared.push_back({storage, sizeof(T) * N});
    memset(static_cast<void*>(storage), exec.poison, sizeof(T) * N);
  }
  return storage;
}

inline void check_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(std::string(what) + " at an address that is not a multiple of its size");
}

// cp.async lands as late as it may (at the wait), and its target is poison from the moment it is issued.
inline void copy_async(void* dst, const void* src, int bytes) {
  check_aligned(dst, 16, "cp.async to shared memory");
  check_aligned(src, 16, "cp.async from global memory");
  if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  memset(dst, exec.poison, 16);
  Fiber& me = exec.fibers[exec.current];
  me.copies.push_back({dst, src, bytes, me.group});
}
inline void copy_async_commit() { ++exec.fibers[exec.current].group; }
inline void copy_async_wait(int leave) {
  Fiber& me = exec.fibers[exec.current];
  size_t kept = 0;
  for (const PendingCopy& c : me.copies) {
    if (c.group < me.group - leave) {
      memcpy(c.dst, c.src, static_cast<size_t>(c.bytes));
      memset(static_cast<char*>(c.dst) + c.bytes, 0, static_cast<size_t>(16 - c.bytes));
    } else {
      me.copies[kept++] = c;
    }
  }
  me.copies.resize(kept);
}

template <class T>
inline T atomic_add(T* at, T v) {
  T old = *at;
  *at = old + v;
  return old;
}

}  // namespace simt

#define SIMT_SITE (::simt::Site{__FILE__, __LINE__})
#define __syncthreads() ::simt::barrier(SIMT_SITE)
#define __syncwarp() ::simt::sync_warp(0xffffffffu, SIMT_SITE)
#define __shfl_sync(mask, v, lane) ::simt::shuffle(mask, v, (lane), "__shfl_sync", SIMT_SITE)
#define __shfl_xor_sync(mask, v, x) ::simt::shuffle(mask, v, ::simt::lane_id() ^ (x), "__shfl_xor_sync", SIMT_SITE)
#define __shfl_down_sync(mask, v, d) ::simt::shuffle(mask, v, ::simt::lane_id() + (d), "__shfl_down_sync", SIMT_SITE)
#define __ballot_sync(mask, p) ::simt::ballot(mask, (p), "__ballot_sync", SIMT_SITE)
#define __any_sync(mask, p) (::simt::ballot(mask, (p), "__any_sync", SIMT_SITE) != 0)
#define atomicAdd(at, v) ::simt::atomic_add(at, v)

#define SHARED_ARRAY(T, name, n) T* name = ::simt::static_shared<T, (n), __COUNTER__>()
#define DYNAMIC_SHARED(name) unsigned char* name = ::simt::exec.dynamic_shared
