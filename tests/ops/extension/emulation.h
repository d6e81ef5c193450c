// CUDA C++ on a CPU, as far as csrc/*.cu use it: every thread of a block is a fiber, blocks run one after another.
// Shared memory is filled with NaN before each block. Asynchronous copies arrive at the wait for them and not before.
// Tensor-core operations check that the warp agrees and that pointers and strides are aligned. Barriers that not all
// threads reach are an error.
//
// Not covered: races (threads run in turn between barriers, blocks in order), memory shared by blocks, the order in which
// tensor cores add, the registers of a fragment, PTX, alignment of plain loads, speed.
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
inline float number(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float number(__half v) { return __half2float(v); }
inline __half __float2half(float v) { return {_Float16(v)}; }
inline int __popc(unsigned v) { return std::popcount(v); }

// ---- threads ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

enum class State { running, at_warp_barrier, at_block_barrier, done };

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

inline std::function<void()> of_warp[32];  // work of lane 0 for its warp at the next barrier

inline bool release(size_t begin, size_t end, State barrier) {
  size_t waiting = 0, done = 0;
  for (size_t i = begin; i < end; ++i) {
    waiting += fibers[i].state == barrier;
    done += fibers[i].state == State::done;
  }
  if (waiting == 0 || waiting + done < end - begin) return false;
  if (done) fail("a barrier after which some threads had already left");
  if (barrier == State::at_warp_barrier && of_warp[begin / 32]) {
    for (size_t i = begin + 1; i < end; ++i)
      if (exchange[i] != exchange[begin]) fail("a warp whose threads disagree about a matrix");
    std::exchange(of_warp[begin / 32], nullptr)();
  }
  for (size_t i = begin; i < end; ++i) fibers[i].state = State::running;
  return true;
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
    for (size_t i = 0; i < threads; i += 32) progress |= release(i, i + 32, State::at_warp_barrier);
    progress |= release(0, threads, State::at_block_barrier);
  }
  for (size_t i = 0; i < threads; ++i)
    if (fibers[i].state != State::done) fail("threads that wait for different barriers");
  for (size_t i = 0; i < threads; ++i)
    for (const auto& group : fibers[i].copies)
      if (!group.empty()) fail("a copy that no thread waited for");
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

// Operations of a whole warp: all its threads must call them with the same arguments.
template <class Body> void together(const void* argument, size_t stride, const Body& body) {
  const unsigned self = current->thread.x;
  exchange[self] = uint64_t(uintptr_t(argument)) * 31 + stride;
  if (self % 32 == 0) of_warp[self / 32] = std::cref(body);
  wait(State::at_warp_barrier);
}

}  // namespace emulation

// A fragment is stored entirely in lane 0, and is NaN until it is written.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major { static constexpr bool kRows = true; };
struct col_major { static constexpr bool kRows = false; };
enum layout_t { mem_row_major };

template <class Use, int kM, int kN, int kK, class T, class Layout = row_major> struct fragment {
  static_assert(kM == 16 && kN == 16 && kK == 16, "the only shape that is emulated");
  float value[16][16];
  fragment() { std::memset(value, 0xff, sizeof(value)); }
};

inline void check(const void* p, size_t stride_bytes) {
  if (uintptr_t(p) % 32) emulation::fail("a matrix of the tensor cores that is not aligned to 32 bytes");
  if (stride_bytes % 16) emulation::fail("a matrix of the tensor cores whose rows are not aligned to 16 bytes");
}

template <class F> void fill_fragment(F& f, float value) {
  for (auto& row : f.value)
    for (float& v : row) v = value;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned stride) {
  check(p, stride * sizeof(T));
  emulation::together(p, stride, [&] {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) f.value[i][j] = number(Layout::kRows ? p[i * stride + j] : p[j * stride + i]);
  });
}

template <class A, class B, class C> void mma_sync(C& d, const A& a, const B& b, const C& c) {
  emulation::together(nullptr, 0, [&] {
    C sum = c;
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 16; ++j) sum.value[i][j] += a.value[i][k] * b.value[k][j];
    d = sum;
  });
}

template <class F> void store_matrix_sync(float* p, const F& f, unsigned stride, layout_t) {
  check(p, stride * sizeof(float));
  emulation::together(p, stride, [&] {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) p[i * stride + j] = f.value[i][j];
  });
}

}  // namespace nvcuda::wmma

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
