// emulation_checks CASE: whether the emulation detects errors. Prints the result, or aborts.
#include "../../../csrc/common.cuh"

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

__global__ void matrix_kernel(int offset, int stride, int by_lane) {
  SMILE_SHARED(float16, memory, [4096]);
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, float16, row_major> a;
  load_matrix_sync(a, memory + offset + by_lane * int(threadIdx.x), stride);
}

__global__ void barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  alignas(16) const float numbers[] = {1, 2, 3, 4, 5, 6, 7, 8};
  float result[6] = {};
  const float* from = numbers;
  float* found = result;
  if (name == "poison") SMILE_LAUNCH(poison_kernel<float16>, 2, 32, nullptr, found);
  if (name == "copies") SMILE_LAUNCH(copies_kernel, 1, 1, nullptr, from, found);
  if (name == "forgotten copy") SMILE_LAUNCH(forgotten_kernel, 1, 32, nullptr, from);
  if (name == "unaligned copy") SMILE_LAUNCH(forgotten_kernel, 1, 32, nullptr, from + 1);
  if (name == "aligned matrix") SMILE_LAUNCH(matrix_kernel, 1, 32, nullptr, 16, 24, 0);
  if (name == "unaligned matrix") SMILE_LAUNCH(matrix_kernel, 1, 32, nullptr, 8, 24, 0);
  if (name == "unaligned rows") SMILE_LAUNCH(matrix_kernel, 1, 32, nullptr, 0, 20, 0);
  if (name == "lanes that disagree") SMILE_LAUNCH(matrix_kernel, 1, 32, nullptr, 0, 24, 16);
  if (name == "barrier") SMILE_LAUNCH(barrier_kernel, 1, 64, nullptr);
  for (float value : result) std::printf("%g ", std::fabs(value));
}
