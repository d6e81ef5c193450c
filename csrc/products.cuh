// The three products that make up forward and backward, each over entries grouped by expert:
//
//     project     out[e]    = F_i x_t                 rank numbers for every entry
//     expand      out[t]   += sum_j F_i^T c_e          to full width, all entries of a token at once
//     accumulate  out_i     = sum_e c_e x_t^T          a factor's gradient
//
// where entry e is slot j of token t, i its expert, and c_e = w_e (s_i * v_e) a vector of coefficients.
#pragma once

#include "common.cuh"

namespace smile {

inline unsigned blocks(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

// ---- project ----

struct Projection {
  const void* x;  // [T, depth], token t at t * x_stride
  int64_t x_stride, depth;
  bool x_aligned;
  // Number c of an expert is the product of x with factor[c] [columns, depth], or with factor[:, c] [depth, columns].
  const void* factor;
  int64_t columns, expert_stride;
  bool factor_aligned;
  float* out;  // [entries, out_columns]
  int64_t out_columns;
  // The groups' tiles, or null: every token with every expert, with the experts' columns side by side in `out`.
  const int32_t *tiles, *entries;
  int64_t tokens, num_experts_per_tok;
};

// A tile of 64 entries x 32 columns. Two warps split the entries, two the depth; copies are issued two passes ahead.
template <class T, bool kTransposed> __global__ void __launch_bounds__(kThreads) project_kernel(Projection p) {
  constexpr int kM = kTileEntries, kN = 32, kDepth = 128 / sizeof(T), kStages = 3, kPad = kVector<T>;
  constexpr int kStrideA = kDepth + kPad, kStrideB = (kTransposed ? kN : kDepth) + kPad;
  constexpr int kSizeA = kM * kStrideA, kSizeB = (kTransposed ? kDepth : kN) * kStrideB;
  constexpr int kStrideOut = kN + 4;
  SMILE_SHARED(unsigned char, memory, [kStages * (kSizeA + kSizeB) * sizeof(T)]);
  static_assert(sizeof(memory) >= 2 * kM * kStrideOut * sizeof(float), "the sums fit where the operands were");
  T* const operands = reinterpret_cast<T*>(memory);

  int64_t begin = blockIdx.x * int64_t(kM), end = begin + kM < p.tokens ? begin + kM : p.tokens;
  const T* factor = static_cast<const T*>(p.factor);
  if (p.tiles != nullptr) {
    const int32_t* tile = p.tiles + 3 * blockIdx.x;
    if (tile[0] < 0) return;
    factor += tile[0] * p.expert_stride;
    begin = tile[1], end = tile[2];
  }
  const auto entry = [&](int64_t place) { return p.entries != nullptr ? int64_t(p.entries[place]) : place; };
  const int64_t column0 = blockIdx.y * int64_t(kN);

  // A vector of 16 bytes of x, and one of the factor, for each copy that this thread makes in a pass.
  constexpr int kPerRowA = kDepth / kVector<T>, kCopiesA = kM * kPerRowA / kThreads;
  constexpr int kPerRowB = (kTransposed ? kN : kDepth) / kVector<T>, kCopiesB = kN * kPerRowA / kThreads;
  const T *row_a[kCopiesA], *row_b[kCopiesB];
#pragma unroll
  for (int v = 0; v < kCopiesA; ++v) {
    const int64_t place = begin + (threadIdx.x + v * kThreads) / kPerRowA;
    row_a[v] = place < end ? static_cast<const T*>(p.x) + entry(place) / p.num_experts_per_tok * p.x_stride : nullptr;
  }
#pragma unroll
  for (int v = 0; v < kCopiesB; ++v) {
    const int64_t c = column0 + (threadIdx.x + v * kThreads) / kPerRowB;
    if constexpr (!kTransposed)
      row_b[v] = c < p.out_columns ? factor + c / p.columns * p.expert_stride + c % p.columns * p.depth : nullptr;
  }
  const auto copy = [&](int pass) {
    const int64_t d0 = pass * int64_t(kDepth);
    T *a = operands + pass % kStages * (kSizeA + kSizeB), *b = a + kSizeA;
    if (d0 < p.depth) {
#pragma unroll
      for (int v = 0; v < kCopiesA; ++v) {
        const int at = threadIdx.x + v * kThreads, d = at % kPerRowA * kVector<T>;
        copy_vector(a + at / kPerRowA * kStrideA + d, row_a[v], d0 + d, p.depth, p.x_aligned);
      }
#pragma unroll
      for (int v = 0; v < kCopiesB; ++v) {
        const int at = threadIdx.x + v * kThreads, along = at % kPerRowB * kVector<T>;
        if constexpr (kTransposed) {
          const int64_t d = d0 + at / kPerRowB;
          const T* row = d < p.depth ? factor + d * p.columns : nullptr;
          copy_vector(b + at / kPerRowB * kStrideB + along, row, column0 + along, p.columns, p.factor_aligned);
        } else {
          copy_vector(b + at / kPerRowB * kStrideB + along, row_b[v], d0 + along, p.depth, p.factor_aligned);
        }
      }
    }
    end_of_copies();
  };

  const int warp = threadIdx.x / 32, rows = warp % 2 * 32, part = warp / 2, k0 = part * (kDepth / 2);
  const int passes = int((p.depth + kDepth - 1) / kDepth);
  WarpTile<T> sum;
  for (int pass = 0; pass < kStages - 1; ++pass) copy(pass);
  for (int pass = 0; pass < passes; ++pass) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    copy(pass + kStages - 1);
    const T *a = operands + pass % kStages * (kSizeA + kSizeB), *b = a + kSizeA;
    sum.template multiply_add<false, kTransposed>(a + rows * kStrideA + k0, kStrideA,
                                                  b + (kTransposed ? k0 * kStrideB : k0), kStrideB, kDepth / 2);
  }
  wait_for_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(memory);  // [2][kM][kStrideOut]: a half of the depth each
  sum.store(sums + (part * kM + rows) * kStrideOut, kStrideOut);
  __syncthreads();
  for (int at = threadIdx.x; at < kM * kN; at += kThreads) {
    const int row = at / kN, c = at % kN;
    if (begin + row < end && column0 + c < p.out_columns)
      p.out[entry(begin + row) * p.out_columns + column0 + c] =
          sums[row * kStrideOut + c] + sums[(kM + row) * kStrideOut + c];
  }
}

template <class T, bool kTransposed> void project(const Projection& p, int64_t tiles, void* stream) {
  const dim3 grid(unsigned(tiles), blocks(p.out_columns, 32));
  SMILE_LAUNCH((project_kernel<T, kTransposed>), grid, kThreads, stream, p);
}

// ---- coefficients ----

// c_e = w_e (s_i * v_e), or v_e alone where weights is null.
struct Coefficients {
  const float* values;   // [T, m, rank]
  const float* weights;  // [T, m]
  const float* s;        // [N, rank]
  int64_t rank;
};

__device__ __forceinline__ float coefficient(const Coefficients& c, int64_t e, int64_t i, int64_t k) {
  const float value = c.values[e * c.rank + k];
  return c.weights == nullptr ? value : c.weights[e] * c.s[i * c.rank + k] * value;
}

// ---- expand ----

struct Expansion {
  Coefficients coefficients;
  const void* factor;  // expert i: [columns, rank], or [rank, columns]
  int64_t columns, expert_stride;
  bool factor_aligned;
  const void* bias;  // [N, columns], expert i's at i * bias_stride, weighted by `weights`; or null
  int64_t bias_stride;
  const float* weights;  // [T, m]
  void* out;             // [T, columns], token t at t * out_stride
  int64_t out_stride;
  bool out_aligned, adds;  // to the values in `out`
  const int32_t* ids;      // [T, m]
  const int32_t* order;    // [T], the order in which tokens are grouped, -1 for an unchanged token; or null
  int64_t tokens, num_experts, num_experts_per_tok;
};

// Column c of token t from its own experts alone.
template <class T, bool kTransposed> __device__ __forceinline__ float expand_one(const Expansion& p, int64_t t, int64_t c) {
  const int64_t rank = p.coefficients.rank, rank_stride = kTransposed ? p.columns : 1, column_stride = kTransposed ? 1 : rank;
  float sum = 0;
  for (int64_t e = t * p.num_experts_per_tok; e < (t + 1) * p.num_experts_per_tok; ++e) {
    if (!is_expert(p.ids[e], p.num_experts)) continue;
    const T* factor = static_cast<const T*>(p.factor) + p.ids[e] * p.expert_stride + c * column_stride;
    for (int64_t k = 0; k < rank; ++k)
      sum += to_float(from_float<T>(coefficient(p.coefficients, e, p.ids[e], k))) * to_float(factor[k * rank_stride]);
  }
  return sum;
}

// A tile of 64 tokens x 64 columns. It iterates over the experts of its tokens; the coefficients of a token without that
// expert are zero. Every number of `out` is read, added to and rounded once.
template <class T, bool kTransposed> __global__ void __launch_bounds__(kThreads) expand_kernel(Expansion p) {
  constexpr int kM = 64, kN = 64, kDepth = 32, kPad = kVector<T>;
  constexpr int kStrideA = kDepth + kPad, kStrideB = (kTransposed ? kN : kDepth) + kPad, kStrideOut = kN + 4;
  constexpr int kSizeB = (kTransposed ? kDepth : kN) * kStrideB;
  constexpr int kBytes = int((kM * kStrideA + kSizeB) * sizeof(T)), kOutBytes = int(kM * kStrideOut * sizeof(float));
  SMILE_SHARED(unsigned char, memory, [kBytes > kOutBytes ? kBytes : kOutBytes]);
  SMILE_SHARED(unsigned, present, [kMostExperts / 32]);
  T *a = reinterpret_cast<T*>(memory), *b = a + kM * kStrideA;

  const int m = int(p.num_experts_per_tok);
  const int64_t place0 = blockIdx.x * int64_t(kM), column0 = blockIdx.y * int64_t(kN);
  const auto token = [&](int row) -> int64_t {
    const int64_t place = place0 + row;
    return place >= p.tokens ? -1 : (p.order != nullptr ? int64_t(p.order[place]) : place);
  };
  if (threadIdx.x < kMostExperts / 32) present[threadIdx.x] = 0;
  __syncthreads();
  for (int at = threadIdx.x; at < kM * m; at += kThreads) {
    const int64_t t = token(at / m);
    if (t < 0) continue;
    const int i = p.ids[t * m + at % m];
    if (is_expert(i, p.num_experts)) atomicOr(&present[i / 32], 1u << i % 32);
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, rows = warp % 2 * 32, columns = warp / 2 * 32;
  const int own_row = threadIdx.x / 2, own_k = threadIdx.x % 2 * (kDepth / 2);  // of the coefficients
  const int64_t own_token = token(own_row), rank = p.coefficients.rank;
  WarpTile<T> sum;
  for (int i = 0; i < kMostExperts; ++i) {
    if (!(present[i / 32] >> i % 32 & 1)) continue;
    const T* factor = static_cast<const T*>(p.factor) + i * p.expert_stride;
    for (int64_t k0 = 0; k0 < rank; k0 += kDepth) {
      float own[kDepth / 2];
#pragma unroll
      for (int k = 0; k < kDepth / 2; ++k) own[k] = 0;
      for (int j = 0; own_token >= 0 && j < m; ++j)
        if (p.ids[own_token * m + j] == i)
#pragma unroll
          for (int k = 0; k < kDepth / 2; ++k)
            if (k0 + own_k + k < rank) own[k] += coefficient(p.coefficients, own_token * m + j, i, k0 + own_k + k);
#pragma unroll
      for (int k = 0; k < kDepth / 2; ++k) a[own_row * kStrideA + own_k + k] = from_float<T>(own[k]);
      constexpr int kPerRow = (kTransposed ? kN : kDepth) / kVector<T>;
#pragma unroll
      for (int at = threadIdx.x; at < kN * kDepth / kVector<T>; at += kThreads) {
        const int row = at / kPerRow, along = at % kPerRow * kVector<T>;
        const int64_t line = (kTransposed ? k0 : column0) + row, from = (kTransposed ? column0 : k0) + along;
        const int64_t lines = kTransposed ? rank : p.columns, length = kTransposed ? p.columns : rank;
        copy_vector(b + row * kStrideB + along, line < lines ? factor + line * length : nullptr, from, length,
                    p.factor_aligned);
      }
      end_of_copies();
      wait_for_copies<0>();
      __syncthreads();
      sum.template multiply_add<false, kTransposed>(a + rows * kStrideA, kStrideA,
                                                    b + (kTransposed ? columns : columns * kStrideB), kStrideB, kDepth);
      __syncthreads();
    }
  }
  float* sums = reinterpret_cast<float*>(memory);  // [kM][kStrideOut]
  sum.store(sums + rows * kStrideOut + columns, kStrideOut);
  __syncthreads();
  for (int at = threadIdx.x; at < kM * kN / kVector<T>; at += kThreads) {
    const int row = at / (kN / kVector<T>), along = at % (kN / kVector<T>) * kVector<T>;
    const int64_t t = token(row), c = column0 + along;
    if (t < 0 || c >= p.columns) continue;
    float* added = sums + row * kStrideOut + along;
    float value[kVector<T>];
    // The value that is not finite may come from another token's expert, multiplied by a coefficient of zero: recompute.
#pragma unroll 1
    for (int v = 0; v < kVector<T>; ++v)
      if (!(fabsf(added[v]) <= FLT_MAX) && c + v < p.columns) added[v] = expand_one<T, kTransposed>(p, t, c + v);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) value[v] = added[v];
    for (int j = 0; p.bias != nullptr && j < m; ++j) {
      if (!is_expert(p.ids[t * m + j], p.num_experts)) continue;
      const T* bias = static_cast<const T*>(p.bias) + p.ids[t * m + j] * p.bias_stride;
      const float w = p.weights[t * m + j];
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v)
        if (c + v < p.columns) value[v] += w * to_float(bias[c + v]);
    }
    T* out = static_cast<T*>(p.out) + t * p.out_stride;
    Vector<T> result;
    if (p.adds) {
      result = load_vector(out, c, p.columns, p.out_aligned);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) value[v] += to_float(result.lane[v]);
    }
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) result.lane[v] = from_float<T>(value[v]);
    if (p.out_aligned && c + kVector<T> <= p.columns) {
      *reinterpret_cast<Vector<T>*>(out + c) = result;
    } else {
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v)
        if (c + v < p.columns) out[c + v] = result.lane[v];
    }
  }
}

template <class T, bool kTransposed> void expand(const Expansion& p, void* stream) {
  const dim3 grid(blocks(p.tokens, 64), blocks(p.columns, 64));
  SMILE_LAUNCH((expand_kernel<T, kTransposed>), grid, kThreads, stream, p);
}

// ---- accumulate ----

struct Accumulation {
  Coefficients coefficients;
  const void* x;  // [T, width], token t at t * x_stride
  int64_t x_stride, width;
  bool x_aligned;
  // Element (i, k, d) at i * expert_stride + k * rank_stride + d * width_stride, for k < out_rank; zero from rank on.
  void* out;
  int64_t out_rank, expert_stride, rank_stride, width_stride;
  const int32_t *entries, *offsets;
  int64_t num_experts_per_tok;
};

// A tile of 32 ranks x 64 columns of one expert's gradient, over all its entries in order.
template <class T> __global__ void __launch_bounds__(kThreads) accumulate_kernel(Accumulation p) {
  constexpr int kM = 32, kN = 64, kEntries = 32, kPad = kVector<T>;
  constexpr int kStrideA = kM + kPad, kStrideB = kN + kPad, kStrideOut = kN + 4;
  constexpr int kBytes = int(kEntries * (kStrideA + kStrideB) * sizeof(T));
  constexpr int kOutBytes = int(2 * kM * kStrideOut * sizeof(float));
  SMILE_SHARED(unsigned char, memory, [kBytes > kOutBytes ? kBytes : kOutBytes]);
  T *a = reinterpret_cast<T*>(memory), *b = a + kEntries * kStrideA;

  const int64_t d0 = blockIdx.x * int64_t(kN), rank0 = blockIdx.y * int64_t(kM), rank = p.coefficients.rank;
  const int i = blockIdx.z, begin = p.offsets[i], end = p.offsets[i + 1];
  const int warp = threadIdx.x / 32, columns = warp % 2 * 32, part = warp / 2;
  WarpTile<T> sum;
  for (int e0 = begin; e0 < end; e0 += kEntries) {
    for (int at = threadIdx.x; at < kEntries * kM; at += kThreads) {
      const int place = e0 + at / kM;
      const int64_t k = rank0 + at % kM;
      const bool there = place < end && k < rank;
      a[at / kM * kStrideA + at % kM] =
          from_float<T>(there ? coefficient(p.coefficients, p.entries[place], i, k) : 0.0f);
    }
#pragma unroll
    for (int at = threadIdx.x; at < kEntries * kN / kVector<T>; at += kThreads) {
      const int row = at / (kN / kVector<T>), along = at % (kN / kVector<T>) * kVector<T>, place = e0 + row;
      const T* x = static_cast<const T*>(p.x);
      if (place < end) x += p.entries[place] / p.num_experts_per_tok * p.x_stride;
      copy_vector(b + row * kStrideB + along, place < end ? x : nullptr, d0 + along, p.width, p.x_aligned);
    }
    end_of_copies();
    wait_for_copies<0>();
    __syncthreads();
    constexpr int kHalf = kEntries / 2;
    sum.template multiply_add<true, true>(a + part * kHalf * kStrideA, kStrideA, b + part * kHalf * kStrideB + columns,
                                          kStrideB, kHalf);
    __syncthreads();
  }
  float* sums = reinterpret_cast<float*>(memory);  // [2][kM][kStrideOut]: half of the entries each
  sum.store(sums + part * kM * kStrideOut + columns, kStrideOut);
  __syncthreads();
  for (int at = threadIdx.x; at < kM * kN; at += kThreads) {
    // Neighbouring threads write neighbouring numbers, for either layout of the gradient.
    const int k = p.width_stride == 1 ? at / kN : at % kM, d = p.width_stride == 1 ? at % kN : at / kM;
    if (rank0 + k < p.out_rank && d0 + d < p.width)
      static_cast<T*>(p.out)[i * p.expert_stride + (rank0 + k) * p.rank_stride + (d0 + d) * p.width_stride] =
          from_float<T>(sums[k * kStrideOut + d] + sums[(kM + k) * kStrideOut + d]);
  }
}

template <class T> void accumulate(const Accumulation& p, int64_t experts, void* stream) {
  const dim3 grid(blocks(p.width, 64), blocks(p.out_rank, 32), unsigned(experts));
  SMILE_LAUNCH(accumulate_kernel<T>, grid, kThreads, stream, p);
}

}  // namespace smile
