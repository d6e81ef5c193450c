// CUDA C++ on a CPU, as far as csrc/*.cu use it: every thread of a block is a fiber, blocks run one after another.
// Shared memory is filled with NaN before each block, and barriers that not all threads reach are an error.
#pragma once

#undef _FORTIFY_SOURCE  // which forbids jumps between stacks

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define __CUDA_ARCH__ 0

extern unsigned char __start_emulated_shared[], __stop_emulated_shared[];

// ---- numbers ----

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };

inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half(float v) { return {_Float16(v)}; }
inline int __popc(unsigned v) { return std::popcount(v); }

// ---- threads ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

enum class State { running, at_warp_barrier, at_block_barrier, done };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;  // null before it starts
  State state;
  dim3 thread;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline jmp_buf scheduler;
inline dim3 block, grid;
inline uint64_t exchange[1024];  // a place for each thread's value in a shuffle
inline std::function<void()> kernel;

inline void wait(State state) {
  current->state = state;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;;) {  // a kernel for each block that runs here
    kernel();
    wait(State::done);
  }
}

// Contexts only begin a fiber: switching by jumps saves their system call.
inline void resume(Fiber& fiber) {
  constexpr size_t kStack = 1 << 16;
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline bool release(size_t begin, size_t end, State barrier) {
  size_t waiting = 0, done = 0;
  for (size_t i = begin; i < end; ++i) {
    waiting += fibers[i].state == barrier;
    done += fibers[i].state == State::done;
  }
  if (waiting == 0 || waiting + done < end - begin) return false;
  if (done) fail("a barrier after which some threads had already left");
  for (size_t i = begin; i < end; ++i) fibers[i].state = State::running;
  return true;
}

inline void run_block(size_t threads) {
  std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  if (fibers.size() < threads) fibers.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    fibers[i].state = State::running;
    fibers[i].thread = dim3(unsigned(i), 0, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t i = 0; i < threads; ++i)
      if (fibers[i].state == State::running) {
        resume(fibers[i]);
        progress = true;
      }
    for (size_t i = 0; i < threads; i += 32) progress |= release(i, i + 32, State::at_warp_barrier);
    progress |= release(0, threads, State::at_block_barrier);
  }
  for (size_t i = 0; i < threads; ++i)
    if (fibers[i].state != State::done) fail("threads that wait for different barriers");
}

inline void launch(dim3 grid_, unsigned threads, std::function<void()> kernel_) {
  grid = grid_;
  kernel = std::move(kernel_);
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) run_block(threads);
}

template <class V> V shuffle(V value, unsigned source) {
  const unsigned self = current->thread.x;
  std::memcpy(&exchange[self], &value, sizeof(value));
  wait(State::at_warp_barrier);
  std::memcpy(&value, &exchange[self / 32 * 32 + source], sizeof(value));
  wait(State::at_warp_barrier);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block)
#define SMILE_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [=] { (void)stream; kernel(__VA_ARGS__); })

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }
template <class V> V __shfl_xor_sync(unsigned, V value, int lanes) {
  return emulation::shuffle(value, threadIdx.x % 32 ^ lanes);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(emulation::shuffle(value, lane)) << lane;
  return votes;
}
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline unsigned atomicOr(unsigned* address, unsigned value) { return std::exchange(*address, *address | value); }
