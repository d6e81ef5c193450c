// A tile of a product held by one warp, on tensor cores where the architecture has them for the type.
#pragma once

#include "common.cuh"

namespace smile {

#if __CUDA_ARCH__ >= 800
template <class T> constexpr bool kTensorCores = !std::is_same<T, float>::value;
#elif __CUDA_ARCH__ >= 750
template <class T> constexpr bool kTensorCores = std::is_same<T, float16>::value;
#else
template <class T> constexpr bool kTensorCores = false;
#endif

// ---- instructions ----

#if defined(SMILE_EMULATION)
using emulation::load_matrices, emulation::multiply_add;
#else
// Four matrices of 8 x 8 numbers of 16 bits in shared memory. Lane l gives the address of row l % 8 of matrix l / 8, and
// receives of each matrix the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of column l / 4 where kTransposed.
template <bool kTransposed> __device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
#endif
}

// c [16, 8] += a [16, 16] b [16, 8]. With (r, p) = (l / 4, 2 (l % 4)), lane l holds two numbers of a, from column p on, in
// each register: of row r, row r + 8, row r, row r + 8, the last two 8 columns further; of b from row p, p + 8 on in
// column r; and c[r, p], c[r, p + 1], c[r + 8, p], c[r + 8, p + 1].
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<T, bfloat16>::value)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
#endif

// ---- the tile ----

// c [kM, kN] (+)= a b. a is [kM, depth] with a row every lda elements, or [depth, kM] where kTransposedA. b is [kN, depth],
// a row for each column of c, or [depth, kN] where kTransposedB. Both are in shared memory, with rows of whole 16 bytes;
// depth, kM and kN are multiples of 16. A number of c has the same bits in any tile.
template <class T, int kM, int kN, bool kOnTensorCores = kTensorCores<T>> class WarpTile {
  static constexpr int kRows = kM / 8, kColumns = kN / 4;

 public:
  template <bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ void multiply_add(const T* a, int lda, const T* b, int ldb, int depth) {
    const int row = threadIdx.x % 32 / 4 * kRows, column = threadIdx.x % 4 * kColumns;
    float sum[kRows][kColumns] = {};  // short sums first: one long chain of additions would round more than cuBLAS does
    for (int k = 0; k < depth; ++k) {
      float left[kRows], right[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) left[i] = to_float(kTransposedA ? a[k * lda + row + i] : a[(row + i) * lda + k]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) right[j] = to_float(kTransposedB ? b[k * ldb + column + j] : b[(column + j) * ldb + k]);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += left[i] * right[j];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) c[i][j] += sum[i][j];
  }

  // Calls use(row, column, c[row, column]) for the numbers of this lane.
  template <class F> __device__ __forceinline__ void for_each(const F& use) const {
    const int row = threadIdx.x % 32 / 4 * kRows, column = threadIdx.x % 4 * kColumns;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) use(row + i, column + j, c[i][j]);
  }

 private:
  float c[kRows][kColumns] = {};
};

template <class T, int kM, int kN> class WarpTile<T, kM, kN, true> {
 public:
  template <bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ void multiply_add(const T* a, int lda, const T* b, int ldb, int depth) {
    const int row = threadIdx.x % 8, upper = threadIdx.x % 32 / 8 % 2 * 8, last = threadIdx.x % 32 / 16 * 8;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      unsigned left[kM / 16][4], right[kN / 16][4];
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) {
        if constexpr (kTransposedA)
          load_matrices<true>(left[i], a + (k + last + row) * lda + 16 * i + upper);
        else
          load_matrices<false>(left[i], a + (16 * i + upper + row) * lda + k + last);
      }
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) {
        if constexpr (kTransposedB)
          load_matrices<true>(right[j], b + (k + upper + row) * ldb + 16 * j + last);
        else
          load_matrices<false>(right[j], b + (16 * j + last + row) * ldb + k + upper);
      }
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kN / 8; ++j)
          smile::multiply_add<T>(c[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }

  template <class F> __device__ __forceinline__ void for_each(const F& use) const {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) use(16 * i + v / 2 * 8 + row, 8 * j + column + v % 2, c[i][j][v]);
  }

 private:
  float c[kM / 16][kN / 8][4] = {};
};

}  // namespace smile
