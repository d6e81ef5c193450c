// project of products.cuh.
#include "products.cuh"

namespace smile {

// A tile of 64 entries x kN columns; each warp has 32 entries and half of the columns. Copies are issued two passes ahead.
// The bits of a number depend on the splits of the depth, and not on kN.
template <class T, bool kTransposed, int kN> __global__ void __launch_bounds__(kThreads) project_kernel(Projection p) {
  constexpr int kM = kTileEntries, kDepth = (kN > 64 ? 64 : 128) / sizeof(T), kStages = 3, kPad = kVector<T>;
  constexpr int kStep = 64 / sizeof(T);  // of the short sums
  constexpr int kStrideA = kDepth + kPad, kStrideB = (kTransposed ? kN : kDepth) + kPad;
  constexpr int kSizeA = kM * kStrideA, kSizeB = (kTransposed ? kDepth : kN) * kStrideB;
  SMILE_SHARED(T, operands, [kStages * (kSizeA + kSizeB)]);
  SMILE_SHARED(int32_t, entry, [kM]);  // -1: none

  int expert = 0;
  int64_t begin = blockIdx.x * int64_t(kM), end = begin + kM < p.tokens ? begin + kM : p.tokens;
  if (p.tiles != nullptr) {
    const int32_t* tile = p.tiles + 3 * blockIdx.x;
    if (tile[0] < 0) return;
    expert = tile[0], begin = tile[1], end = tile[2];
  }
  for (int row = threadIdx.x; row < kM; row += kThreads)
    entry[row] = begin + row >= end ? -1 : p.tiles != nullptr ? p.entries[begin + row] : int32_t(begin + row);
  __syncthreads();
  const int64_t column0 = blockIdx.y * int64_t(kN), d_begin = blockIdx.z * p.depth_of_split;
  const int64_t d_end = d_begin + p.depth_of_split < p.depth ? d_begin + p.depth_of_split : p.depth;
  const T *first = static_cast<const T*>(p.first) + expert * p.first_stride;
  const T *second = p.second != nullptr ? static_cast<const T*>(p.second) + expert * p.second_stride : nullptr;

  // A vector of 16 bytes of x, and one of the factor, for each copy that this thread makes in a pass.
  constexpr int kPerRowA = kDepth / kVector<T>, kCopiesA = kM * kPerRowA / kThreads;
  constexpr int kPerRowB = (kTransposed ? kN : kDepth) / kVector<T>, kCopiesB = kN * kPerRowA / kThreads;
  const T *row_a[kCopiesA], *row_b[kCopiesB];
#pragma unroll
  for (int v = 0; v < kCopiesA; ++v) {
    const int e = entry[(threadIdx.x + v * kThreads) / kPerRowA];
    row_a[v] = e >= 0 ? static_cast<const T*>(p.x) + e / p.num_experts_per_tok * p.x_stride : nullptr;
  }
#pragma unroll
  for (int v = 0; v < kCopiesB; ++v)
    row_b[v] = kTransposed ? nullptr : row_of(p, first, second, column0 + (threadIdx.x + v * kThreads) / kPerRowB);
  const auto copy = [&](int pass) {
    const int64_t d0 = d_begin + pass * int64_t(kDepth);
    T *a = operands + pass % kStages * (kSizeA + kSizeB), *b = a + kSizeA;
    if (d0 < d_end) {
#pragma unroll
      for (int v = 0; v < kCopiesA; ++v) {
        const int at = threadIdx.x + v * kThreads, d = at % kPerRowA * kVector<T>;
        copy_vector(a + at / kPerRowA * kStrideA + d, row_a[v], d0 + d, d_end, p.x_aligned);
      }
#pragma unroll
      for (int v = 0; v < kCopiesB; ++v) {
        const int at = threadIdx.x + v * kThreads, along = at % kPerRowB * kVector<T>;
        if constexpr (kTransposed) {
          const int64_t d = d0 + at / kPerRowB;
          const T* row = d < d_end ? first + d * p.columns : nullptr;
          copy_vector(b + at / kPerRowB * kStrideB + along, row, column0 + along, p.columns, p.factor_aligned);
        } else {
          copy_vector(b + at / kPerRowB * kStrideB + along, row_b[v], d0 + along, d_end, p.factor_aligned);
        }
      }
    }
    end_of_copies();
  };

  const int warp = threadIdx.x / 32, rows = warp % 2 * 32, columns = warp / 2 * (kN / 2);
  const int passes = int((d_end - d_begin + kDepth - 1) / kDepth);
  WarpTile<T, 32, kN / 2> sum;
  for (int pass = 0; pass < kStages - 1; ++pass) copy(pass);
  for (int pass = 0; pass < passes; ++pass) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    copy(pass + kStages - 1);
    const T *a = operands + pass % kStages * (kSizeA + kSizeB), *b = a + kSizeA;
#pragma unroll(kTensorCores<T> ? kDepth / kStep : 1)
    for (int k = 0; k < kDepth; k += kStep)
      sum.template multiply_add<false, kTransposed>(
          a + rows * kStrideA + k, kStrideA, b + (kTransposed ? k * kStrideB + columns : columns * kStrideB + k), kStrideB, kStep);
  }
  wait_for_copies<0>();
  float* out = p.out + blockIdx.z * p.tokens * p.out_columns;
  sum.for_each([&](int row, int column, float value) {
    const int64_t e = entry[rows + row], c = column0 + columns + column;
    if (e >= 0 && c < p.out_columns) out[e * p.out_columns + c] = value;
  });
  if (p.scaled == nullptr) return;
  sum.for_each([&](int row, int column, float value) {
    const int64_t e = entry[rows + row], c = column0 + columns + column;
    if (e < 0 || c >= padded(p.columns)) return;
    static_cast<T*>(p.scaled)[e * padded(p.columns) + c] =
        from_float<T>(c < p.columns ? p.weights[e] * p.s[expert * p.columns + c] * value : 0.0f);
  });
}

template <class T, bool kTransposed, int kN> void project_tiles(const Projection& p, int64_t tiles, void* stream) {
  const dim3 grid(unsigned(tiles), blocks(p.out_columns, kN), unsigned(p.splits));
  SMILE_LAUNCH((project_kernel<T, kTransposed, kN>), grid, kThreads, stream, p);
}

template <class T> static void project_groups(bool transposed, const Projection& p, int64_t tiles, void* stream) {
  if (transposed)
    project_tiles<T, true, 32>(p, tiles, stream);
  else if (p.columns > 64)
    project_tiles<T, false, 128>(p, tiles, stream);
  else
    project_tiles<T, false, 32>(p, tiles, stream);
}

void project_groups(DType dtype, bool transposed, Projection p, const Sizes& n, const Groups& groups, void* stream) {
  p.tiles = groups.tiles;
  p.entries = groups.entries;
  p.num_experts_per_tok = n.num_experts_per_tok;
  p.first_rows = p.out_columns = p.columns;
  p.splits = 1;
  p.depth_of_split = p.depth;
  with_type(dtype, [&](auto type) { project_groups<decltype(type)>(transposed, p, tile_count(n), stream); });
}

int64_t project_all(DType dtype, Projection p, int64_t splits_wanted, void* stream) {
  constexpr int64_t kEach = 64;  // a split is a multiple of it, so that rows stay aligned
  p.num_experts_per_tok = 1;
  p.depth_of_split = blocks(p.depth, kEach * splits_wanted) * kEach;
  p.splits = blocks(p.depth, p.depth_of_split);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t tiles = blocks(p.tokens, kTileEntries);
    p.out_columns > 64 ? project_tiles<T, false, 128>(p, tiles, stream) : project_tiles<T, false, 32>(p, tiles, stream);
  });
  return p.splits;
}

}  // namespace smile
