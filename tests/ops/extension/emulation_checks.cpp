// emulation_checks CASE: whether the emulation detects errors. Prints the result, or aborts.
#include "../../../csrc/tile.cuh"

#include <string>

using namespace smile;

static_assert(kTensorCores<float16> && kTensorCores<bfloat16> && !kTensorCores<float>, "the branches of a GPU of today");

// Shared memory of a template: its contents in the second block before it writes.
template <class T> __global__ void poison_kernel(float* found) {
  SMILE_SHARED(T, memory, [64]);
  found[blockIdx.x] = to_float(memory[threadIdx.x]);
  memory[threadIdx.x] = from_float<T>(1);
}

// Two groups of copies: the contents before any wait, after the wait for the first, and after all.
__global__ void copies_kernel(const float* from, float* found) {
  SMILE_SHARED(float, memory, [8]);
  for (int group = 0; group < 2; ++group) {
    copy_async(memory + 4 * group, from + 4 * group);
    commit_copies();
  }
  for (int i = 0; i < 2; ++i) found[i] = memory[4 * i];
  wait_copies<1>();
  for (int i = 0; i < 2; ++i) found[2 + i] = memory[4 * i];
  wait_copies<0>();
  for (int i = 0; i < 2; ++i) found[4 + i] = memory[4 * i];
}

__global__ void forgotten_kernel(const float* from) {
  SMILE_SHARED(float, memory, [4]);
  copy_async(memory, from);
  commit_copies();
}

__global__ void matrix_kernel(int stride) {
  SMILE_SHARED(float16, memory, [4096]);
  unsigned to[4];
  load_matrices<false>(to, memory + stride * int(threadIdx.x));
}

__global__ void disagreement_kernel() {
  SMILE_SHARED(float16, memory, [256]);
  unsigned to[4];
  if (threadIdx.x < 16)
    load_matrices<false>(to, memory + 8 * threadIdx.x);
  else
    __syncwarp();
}

constexpr int kStride = 72, kDepth = 48;

template <class T, bool kTransposedA, bool kTransposedB> __global__ void tile_kernel(const T* a, const T* b, float* out) {
  SMILE_SHARED(T, shared, [2][64 * kStride]);
  for (int at = threadIdx.x; at < 64 * kStride; at += 32) shared[0][at] = a[at], shared[1][at] = b[at];
  __syncwarp();
  WarpTile<T, 32, 64> tile;
  tile.template multiply_add<kTransposedA, kTransposedB>(shared[0], kStride, shared[1], kStride, kDepth);
  tile.for_each([&](int row, int column, float value) { out[row * 64 + column] = value; });
}

// The largest error of a product of small integers, which is exact.
template <class T, bool kTransposedA, bool kTransposedB> float tile_error() {
  static T a[64 * kStride], b[64 * kStride];
  static float c[32 * 64];
  for (int at = 0; at < 64 * kStride; ++at) a[at] = from_float<T>(at * 37 % 101 - 50), b[at] = from_float<T>(at * 53 % 97 - 48);
  const T *left = a, *right = b;
  float *out = c, worst = 0;
  SMILE_LAUNCH((tile_kernel<T, kTransposedA, kTransposedB>), 1, 32, nullptr, left, right, out);
  emulated_finish();
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < 64; ++j) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum += to_float(a[kTransposedA ? k * kStride + i : i * kStride + k]) * to_float(b[kTransposedB ? k * kStride + j : j * kStride + k]);
      worst = std::fmax(worst, std::fabs(sum - c[i * 64 + j]));
    }
  return worst;
}

template <class T> void tile_errors(float* found) {
  found[0] = std::fmax(tile_error<T, false, false>(), tile_error<T, false, true>());
  found[1] = std::fmax(tile_error<T, true, false>(), tile_error<T, true, true>());
}

// The second kernel reads what the first one writes before and after the wait for it.
__global__ void first_kernel(float* numbers) { numbers[threadIdx.x] = 1; }
__global__ void second_kernel(const float* numbers, float* found) {
  const float before = numbers[threadIdx.x];
  wait_for_previous();
  if (threadIdx.x < 3) found[threadIdx.x] = before, found[3 + threadIdx.x] = numbers[threadIdx.x];
}
__global__ void hasty_kernel(float*) {}

__global__ void barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  alignas(16) const float numbers[] = {1, 2, 3, 4, 5, 6, 7, 8};
  float result[6] = {}, memory[32] = {};
  const float* from = numbers;
  float *found = result, *scratch = memory;
  if (name == "poison") SMILE_LAUNCH(poison_kernel<float16>, 2, 32, nullptr, found);
  if (name == "copies") SMILE_LAUNCH(copies_kernel, 1, 1, nullptr, from, found);
  if (name == "forgotten copy") SMILE_LAUNCH(forgotten_kernel, 1, 32, nullptr, from);
  if (name == "unaligned copy") SMILE_LAUNCH(forgotten_kernel, 1, 32, nullptr, from + 1);
  if (name == "aligned matrix") SMILE_LAUNCH(matrix_kernel, 1, 32, nullptr, 8);
  if (name == "unaligned matrix") SMILE_LAUNCH(matrix_kernel, 1, 32, nullptr, 12);
  if (name == "lanes that disagree") SMILE_LAUNCH(disagreement_kernel, 1, 32, nullptr);
  if (name == "tiles") tile_errors<float>(result), tile_errors<float16>(result + 2), tile_errors<bfloat16>(result + 4);
  if (name == "barrier") SMILE_LAUNCH(barrier_kernel, 1, 64, nullptr);
  if (name == "early start" || name == "no wait") SMILE_LAUNCH(first_kernel, 1, 32, nullptr, scratch);
  if (name == "early start") SMILE_LAUNCH_EARLY(second_kernel, 1, 32, nullptr, scratch, found);
  if (name == "no wait") SMILE_LAUNCH_EARLY(hasty_kernel, 1, 32, nullptr, scratch);
  emulated_finish();
  for (float value : result) std::printf("%g ", std::fabs(value));
}
