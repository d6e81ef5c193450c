// Building blocks of the CUDA kernels: number types, asynchronous copies, warp sums and top-m.
#pragma once

#if defined(SMILE_EMULATION)
#include "emulation.h"  // the tests run these kernels on a CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SMILE_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// The kernel may start before the previous one has ended, and calls wait_for_previous.
#define SMILE_LAUNCH_EARLY(kernel, grid, block, stream, ...) launch_early(kernel, grid, block, stream, __VA_ARGS__)
#define SMILE_SHARED(type, name, extents) __shared__ __align__(128) type name extents
#endif

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "smile.h"

namespace smile {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kThreads = 128;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float16 v) { return __half2float(v); }

template <class T> __device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same<T, float>::value)
    return v;
  else if constexpr (std::is_same<T, bfloat16>::value)
    return __float2bfloat16(v);
  else
    return __float2half(v);
}

// ---- 16 bytes at once ----

template <class T> constexpr int kVector = 16 / sizeof(T);
template <class T> struct __align__(16) Vector { T lane[kVector<T>]; };

// Rows that start at p and repeat after `stride` elements can be read 16 bytes at a time.
template <class T> bool aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kVector<T> == 0;
}

// row[at : at + kVector], zeros from `end` on.
template <class T> __device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t at, int64_t end, bool is_aligned) {
  if (is_aligned && at + kVector<T> <= end) return *reinterpret_cast<const Vector<T>*>(row + at);
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) v.lane[i] = at + i < end ? row[at + i] : from_float<T>(0.0f);
  return v;
}

// Copies 16 bytes into shared memory; they can be read only after waiting for their group of copies.
#if defined(SMILE_EMULATION)
using emulation::commit_copies, emulation::copy_async, emulation::wait_copies;
#elif __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
#endif

// load_vector into shared memory, asynchronously where the architecture can; row null: zeros.
template <class T>
__device__ __forceinline__ void copy_vector(T* shared, const T* row, int64_t at, int64_t end, bool is_aligned) {
#if __CUDA_ARCH__ >= 800
  if (row != nullptr && is_aligned && at + kVector<T> <= end) {
    copy_async(shared, row + at);
    return;
  }
#endif
  *reinterpret_cast<Vector<T>*>(shared) = load_vector(row, at, row == nullptr ? at : end, is_aligned);
}

__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
  commit_copies();
#endif
}

// Waits until at most `kLeft` groups of copies are pending.
template <int kLeft> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  wait_copies<kLeft>();
#endif
}

// An id outside [0, N) means no expert.
__device__ __forceinline__ bool is_expert(int32_t id, int64_t num_experts) { return id >= 0 && id < num_experts; }

// ---- warps ----

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAllLanes, v, lanes);
  return v;
}

// |q|, also where the squares overflow or vanish.
__device__ __forceinline__ float norm(const float* q, int64_t count) {
  float sum = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += q[i] * q[i];
    largest = fmaxf(largest, fabsf(q[i]));
  }
  if (sum != sum || (sum > FLT_MIN / FLT_EPSILON && sum <= FLT_MAX)) return sqrtf(sum);
  if (largest == 0 || largest > FLT_MAX) return largest;
  sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (q[i] / largest) * (q[i] / largest);
  return largest * sqrtf(sum);
}

constexpr int kEach = kMostExperts / 32;  // experts of a lane: lane, lane + 32, ...

// By one warp: top-m of the scores of count experts, ties to the lower index, and the softmax over them. NaN ranks last,
// and an infinite score counts as the largest finite one. Writes weights [m] and ids [m].
__device__ __forceinline__ void choose(float (&score)[kEach], int64_t count, int m, float* weights, int32_t* ids) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    score[k] = score[k] != score[k] ? -FLT_MAX : fminf(score[k], FLT_MAX);
    if (lane + 32 * k >= count) score[k] = -INFINITY;
  }
  float first = 0, sum = 0;
  for (int j = 0; j < m; ++j) {
    float best = -INFINITY;
    int id = kMostExperts;
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (score[k] > best) best = score[k], id = lane + 32 * k;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, lanes);
      const int other_id = __shfl_xor_sync(kAllLanes, id, lanes);
      if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (id == lane + 32 * k) score[k] = -INFINITY;
    if (j == 0) first = best;
    sum += expf(best - first);
    if (lane == 0) weights[j] = expf(best - first), ids[j] = id;
  }
  __syncwarp();
  for (int j = lane; j < m; j += 32) weights[j] /= sum;
}

// The same with the scores |q_i| of one token, q_i at i * stride.
__device__ __forceinline__ void choose(const float* q, int64_t stride, const Sizes& n, float* weights, int32_t* ids) {
  float score[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = threadIdx.x % 32 + 32 * k;
    score[k] = i < n.num_experts ? norm(q + i * stride, n.rank_of_router) : 0;
  }
  choose(score, n.num_experts, int(n.num_experts_per_tok), weights, ids);
}

// ---- launching ----

inline unsigned blocks(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

// By every thread, before it reads what the previous kernel wrote.
__device__ __forceinline__ void wait_for_previous() {
#if defined(SMILE_EMULATION)
  emulation::wait(emulation::State::at_previous_kernel);
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel, if launched early, may start when all blocks have called this.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900 && !defined(SMILE_EMULATION)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if !defined(SMILE_EMULATION)
// Only code compiled for sm_90 or later waits: PTX for older ones also runs on newer devices.
template <class... P, class... A> void launch_early(void (*kernel)(P...), dim3 grid, unsigned block, void* stream, A... arguments) {
  static std::atomic<int> waits[64];  // of each device: 0 if not known, 1 no, 2 yes
  int device = 0, known = 0;
  const bool has_place = cudaGetDevice(&device) == cudaSuccess && device < 64;
  if (has_place) known = waits[device];
  if (known == 0) {
    cudaFuncAttributes attributes{};
    known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 ? 2 : 1;
    if (has_place) waits[device] = known;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = known == 2 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}
#endif

// Calls f with a value of the type that dtype names.
template <class F> void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::bfloat16: return f(bfloat16{});
    case DType::float16: return f(float16{});
    case DType::float64: return;  // refused by the bindings
  }
}

}  // namespace smile
