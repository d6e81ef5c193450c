// CUDA C++ on a CPU, as far as csrc/*.cu use it: every thread of a block is a fiber, blocks run one after another.
// Shared memory is filled with NaN before each block. Asynchronous copies arrive at the wait for them and not before.
// Tensor-core operations follow the registers of the PTX manual and check that rows are aligned. Barriers that not all
// threads reach are an error. The first block of a kernel that starts early waits before the previous kernel runs.
//
// Not covered: races (threads run in turn between barriers, blocks in order), memory shared by blocks, the order in which
// tensor cores add, the text of PTX, alignment of plain loads, speed.
#pragma once

#undef _FORTIFY_SOURCE  // which forbids jumps between stacks

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#if !defined(__CUDA_ARCH__)
#define __CUDA_ARCH__ 900
#endif

// The object with the memory registers it with run_block, for any template that it is a part of.
#define SMILE_SHARED(type, name, extents)                 \
  alignas(128) static type name extents;                  \
  static const emulation::Shared name##_shared(&name, sizeof(name))

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
inline int __ffs(unsigned v) { return v ? std::countr_zero(v) + 1 : 0; }

// ---- threads ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

enum class State { running, at_warp_barrier, at_block_barrier, at_previous_kernel, done };

// The copies requested by a thread, in groups; the last group is open.
struct Copy { void* to; const void* from; };
using Copies = std::vector<std::vector<Copy>>;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;  // null before it starts
  State state;
  dim3 thread;
  Copies copies;
};

inline std::vector<Fiber> fibers;
inline std::vector<std::pair<void*, size_t>> shared;

// One array of shared memory.
struct Shared {
  Shared(void* memory, size_t size) {
    shared.emplace_back(memory, size);
    std::memset(memory, 0xff, size);
  }
};

inline Fiber* current;
inline jmp_buf scheduler;
inline dim3 block, grid;
inline uint64_t exchange[1024];  // a place for each thread's value in a shuffle
inline std::function<void()> kernel;
inline std::function<void()> pending;  // the last launch

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

// Contexts only start a fiber: switching by jumps avoids their system call.
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

// What a lane gives to an operation of its warp, and what it receives when all lanes have arrived.
struct Lane {
  void (*operation)(Lane* warp);  // null at a plain barrier
  const void* row;
  unsigned in[6], out[4];
  float c[4];
};
inline Lane lanes[1024];

inline bool release(size_t begin, size_t end, State barrier) {
  size_t waiting = 0, done = 0;
  for (size_t i = begin; i < end; ++i) {
    waiting += fibers[i].state == barrier;
    done += fibers[i].state == State::done;
  }
  if (waiting == 0 || waiting + done < end - begin) return false;
  if (done) fail("a barrier after which some threads had already left");
  if (barrier == State::at_warp_barrier) {
    const auto operation = lanes[begin].operation;
    for (size_t i = begin; i < end; ++i)
      if (std::exchange(lanes[i].operation, nullptr) != operation) fail("a warp whose threads disagree about an operation");
    if (operation) operation(lanes + begin);
  }
  for (size_t i = begin; i < end; ++i) fibers[i].state = State::running;
  return true;
}

// Carries out the last launch.
inline void finish() {
  if (pending) std::exchange(pending, nullptr)();
}

// The same while a block of the next launch waits for it.
inline void finish_between() {
  auto waiting = std::exchange(fibers, {});
  const auto place = std::make_tuple(block, grid, kernel);
  std::vector<std::vector<char>> contents;
  for (const auto& [memory, size] : shared)
    contents.emplace_back(static_cast<char*>(memory), static_cast<char*>(memory) + size);
  finish();
  for (size_t i = 0; i < contents.size(); ++i) std::memcpy(shared[i].first, contents[i].data(), contents[i].size());
  std::tie(block, grid, kernel) = place;
  fibers = std::move(waiting);
}

inline void run_block(size_t threads) {
  for (const auto& [memory, size] : shared) std::memset(memory, 0xff, size);
  if (fibers.size() < threads) fibers.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    fibers[i].state = State::running;
    fibers[i].thread = dim3(unsigned(i), 0, 0);
    fibers[i].copies.assign(1, {});
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t i = 0; i < threads; ++i)
      if (fibers[i].state == State::running) {
        resume(fibers[i]);
        progress = true;
      }
    for (size_t i = 0; i < threads; i += 32) progress |= release(i, std::min(i + 32, threads), State::at_warp_barrier);
    progress |= release(0, threads, State::at_block_barrier);
    if (release(0, threads, State::at_previous_kernel)) {
      if (pending) finish_between();
      progress = true;
    }
  }
  for (size_t i = 0; i < threads; ++i)
    if (fibers[i].state != State::done) fail("threads that wait for different barriers");
  for (size_t i = 0; i < threads; ++i)
    for (const auto& group : fibers[i].copies)
      if (!group.empty()) fail("a copy that no thread waited for");
}

inline std::string launched;  // the kernels, each with a space after it

inline void run_grid(dim3 grid_, unsigned threads, const std::function<void()>& kernel_) {
  grid = grid_;
  kernel = kernel_;
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) run_block(threads);
}

// A launch runs when the next one is made, or at the end of the call; one that starts early runs at once, and its first
// block runs up to its wait before the previous launch does.
inline void launch(const char* name, bool early, dim3 grid_, unsigned threads, std::function<void()> kernel_) {
  launched += std::string(name) + " ";
  if (early) {
    run_grid(grid_, threads, kernel_);
    if (pending) fail("a kernel that starts early and does not wait for the previous one");
    return;
  }
  finish();
  pending = [=] { run_grid(grid_, threads, kernel_); };
}

template <class V> V shuffle(V value, unsigned source) {
  const unsigned self = current->thread.x;
  std::memcpy(&exchange[self], &value, sizeof(value));
  wait(State::at_warp_barrier);
  std::memcpy(&value, &exchange[self / 32 * 32 + source], sizeof(value));
  wait(State::at_warp_barrier);
  return value;
}

// ---- asynchronous copies ----

inline void copy_async(void* to, const void* from) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) fail("an asynchronous copy that is not aligned");
  current->copies.back().push_back({to, from});
}

inline void commit_copies() { current->copies.emplace_back(); }

template <size_t kLeft> void wait_copies() {
  Copies& copies = current->copies;
  for (; copies.size() > kLeft + 1; copies.erase(copies.begin()))
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, 16);
}

// ---- tensor cores ----

inline float number_of(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float number_of(uint16_t bits, __half) { return float(std::bit_cast<_Float16>(bits)); }

// An operation of the whole warp.
inline void together(void (*operation)(Lane*)) {
  lanes[current->thread.x].operation = operation;
  wait(State::at_warp_barrier);
}

// ldmatrix .x4 of 8 x 8 numbers of 16 bits, as in the PTX manual.
template <bool kTransposed> void load_matrices(unsigned (&to)[4], const void* row) {
  Lane& own = lanes[current->thread.x];
  own.row = row;
  together([](Lane* warp) {
    for (int l = 0; l < 32; ++l) {
      if (uintptr_t(warp[l].row) % 16) fail("a row of a matrix of the tensor cores that is not aligned to 16 bytes");
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int k = 0; k < 2; ++k) {
          const int i = kTransposed ? l % 4 * 2 + k : l / 4, j = kTransposed ? l / 4 : l % 4 * 2 + k;
          pair[k] = static_cast<const uint16_t*>(warp[8 * matrix + i].row)[j];
        }
        std::memcpy(&warp[l].out[matrix], pair, 4);
      }
    }
  });
  std::memcpy(to, own.out, sizeof(to));
}

// mma.m16n8k16 with float32 sums: the fragments as in the PTX manual, the additions in an order of our own.
template <class T> void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Lane& own = lanes[current->thread.x];
  const unsigned in[] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(own.in, in, sizeof(in));
  std::memcpy(own.c, c, sizeof(c));
  together([](Lane* warp) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l)
      for (int word = 0; word < 6; ++word)
        for (int k = 0; k < 2; ++k) {
          const float v = number_of(uint16_t(warp[l].in[word] >> 16 * k), T{});
          if (word < 4)
            left[l / 4 + word % 2 * 8][l % 4 * 2 + k + word / 2 * 8] = v;
          else
            right[l % 4 * 2 + k + (word - 4) * 8][l / 4] = v;
        }
    for (int l = 0; l < 32; ++l)
      for (int v = 0; v < 4; ++v)
        for (int k = 0; k < 16; ++k) warp[l].c[v] += left[l / 4 + v / 2 * 8][k] * right[k][l % 4 * 2 + v % 2];
  });
  std::memcpy(c, own.c, sizeof(c));
}

}  // namespace emulation

extern "C" inline __attribute__((used)) void emulated_finish() { emulation::finish(); }

// The kernels launched since the last call of this function.
extern "C" inline __attribute__((used)) const char* emulated_launches() {
  static std::string answer;
  answer = std::exchange(emulation::launched, "");
  return answer.c_str();
}

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block)
#define SMILE_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(#kernel, false, grid, block, [=] { (void)stream; kernel(__VA_ARGS__); })
#define SMILE_LAUNCH_EARLY(kernel, grid, block, stream, ...) \
  emulation::launch(#kernel, true, grid, block, [=] { (void)stream; kernel(__VA_ARGS__); })

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }
template <class V> V __shfl_xor_sync(unsigned, V value, int lanes) {
  return emulation::shuffle(value, threadIdx.x % 32 ^ lanes);
}
template <class V> V __shfl_up_sync(unsigned, V value, unsigned lanes) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::shuffle(value, lane < lanes ? lane : lane - lanes);
}
// The lanes whose value is that of this lane.
inline unsigned __match_any_sync(unsigned, int value) {
  emulation::Lane& own = emulation::lanes[threadIdx.x];
  own.in[0] = unsigned(value);
  emulation::together([](emulation::Lane* warp) {
    for (int l = 0; l < 32; ++l) {
      warp[l].out[0] = 0;
      for (int other = 0; other < 32; ++other) warp[l].out[0] |= unsigned(warp[other].in[0] == warp[l].in[0]) << other;
    }
  });
  return own.out[0];
}
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline unsigned atomicOr(unsigned* address, unsigned value) { return std::exchange(*address, *address | value); }
