// The three products that make up forward and backward, each over entries grouped by expert:
//
//     project     out[e]    = F_i x_t                 rank numbers for every entry
//     expand      out[t]   += sum_j F_i^T c_e          to full width, all entries of a token at once
//     accumulate  out_i     = sum_e c_e x_t^T          a factor's gradient
//
// where entry e is slot j of token t, i its expert, and c_e = w_e (s_i * v_e) a vector of coefficients, formed once.
#pragma once

#include "tile.cuh"

namespace smile {

// ---- project ----

struct Projection {
  const void* x;  // [T, depth], token t at t * x_stride
  int64_t x_stride, depth;
  bool x_aligned;
  // Number c of expert i is the product of x with row c of `first`, or row c - first_rows of `second`, which has them from
  // row first_rows on; expert i's rows are at i * stride. Transposed: with column c of `first` [depth, columns].
  const void *first, *second;
  int64_t first_stride, second_stride, first_rows, columns;
  bool factor_aligned;
  // Null: out is [splits, tokens, out_columns], every token with every expert, the experts' columns side by side, and split
  // z has the sums over depths z * depth_of_split to (z + 1) * depth_of_split. Else the tiles and entries of Groups: out is
  // [entries, columns], each entry with its own expert.
  const int32_t *tiles, *entries;
  float* out;
  int64_t out_columns, tokens, num_experts_per_tok, splits, depth_of_split;
  // With groups: where not null, scaled [entries, padded(columns)] = w_e (s_i * out_e) in the type of x.
  void* scaled;
  const float *weights, *s;
};

// The row for column c of `out`, or null.
template <class T>
__device__ __forceinline__ const T* row_of(const Projection& p, const T* first, const T* second, int64_t c) {
  const int64_t i = c / p.columns, k = c % p.columns;
  if (c >= p.out_columns) return nullptr;
  return k < p.first_rows ? first + i * p.first_stride + k * p.depth
                          : second + i * p.second_stride + (k - p.first_rows) * p.depth;
}

// Each entry with its own expert; transposed as above.
void project_groups(DType dtype, bool transposed, Projection p, const Sizes& n, const Groups& groups, void* stream);
// Every token with every expert; returns the number of splits, at most those wanted.
int64_t project_all(DType dtype, Projection p, int64_t splits_wanted, void* stream);

// ---- expand ----

struct Expansion {
  const void* values;  // c_e, [entries, padded(rank)] in the type of x
  int64_t rank;
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
  const int64_t rank_stride = kTransposed ? p.columns : 1, column_stride = kTransposed ? 1 : p.rank;
  float sum = 0;
  for (int64_t e = t * p.num_experts_per_tok; e < (t + 1) * p.num_experts_per_tok; ++e) {
    if (!is_expert(p.ids[e], p.num_experts)) continue;
    const T* factor = static_cast<const T*>(p.factor) + p.ids[e] * p.expert_stride + c * column_stride;
    const T* values = static_cast<const T*>(p.values) + e * padded(p.rank);
    for (int64_t k = 0; k < p.rank; ++k) sum += to_float(values[k]) * to_float(factor[k * rank_stride]);
  }
  return sum;
}

// The first expert from i on whose bit is set, or kMostExperts.
__device__ __forceinline__ int next_present(const unsigned* present, int i) {
  for (; i < kMostExperts; i = i / 32 * 32 + 32)
    if (const unsigned left = present[i / 32] >> i % 32) return i + __ffs(left) - 1;
  return kMostExperts;
}

// The coefficients at, ..., at + count - 1 of token t for expert i into shared memory, zeros if it does not have the expert.
template <class T, int kCount>
__device__ __forceinline__ void copy_values(T* shared, const Expansion& p, int64_t t, int i, int64_t at) {
  const int64_t stride = padded(p.rank), m = p.num_experts_per_tok;
  const T *row = nullptr, *values = static_cast<const T*>(p.values);
  bool repeated = false;
  for (int64_t e = t * m; t >= 0 && e < (t + 1) * m; ++e)
    if (p.ids[e] == i) repeated |= row != nullptr, row = values + e * stride;
#pragma unroll
  for (int k = 0; k < kCount; k += kVector<T>) {
    if (!repeated) {
      copy_vector(shared + k, row, at + k, stride, true);
      continue;
    }
    for (int v = 0; v < kVector<T>; ++v) {
      float sum = 0;
      for (int64_t e = t * m; e < (t + 1) * m; ++e)
        if (p.ids[e] == i && at + k + v < p.rank) sum += to_float(values[e * stride + at + k + v]);
      shared[k + v] = from_float<T>(sum);
    }
  }
}

// A tile of 64 tokens x 64 columns. It iterates over the experts of its tokens, and copies one pass ahead; the coefficients
// of a token without that expert are zero. Every number of `out` is read, added to and rounded once.
template <class T, bool kTransposed> __global__ void __launch_bounds__(kThreads) expand_kernel(Expansion p) {
  constexpr int kM = 64, kN = 64, kDepth = 32, kPad = kVector<T>, kPerOut = kN / kVector<T>, kOuts = kM * kPerOut / kThreads;
  constexpr int kStrideA = kDepth + kPad, kStrideB = (kTransposed ? kN : kDepth) + kPad, kStrideOut = kN + 4;
  constexpr int kSizeA = kM * kStrideA, kSize = kSizeA + (kTransposed ? kDepth : kN) * kStrideB;
  constexpr int kBytes = 2 * kSize * int(sizeof(T)), kOutBytes = int(kM * kStrideOut * sizeof(float));
  SMILE_SHARED(unsigned char, memory, [kBytes > kOutBytes ? kBytes : kOutBytes]);
  SMILE_SHARED(unsigned, present, [kMostExperts / 32]);
  T* const operands = reinterpret_cast<T*>(memory);

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
  // What a thread reads of `out`: float32 at the end instead, since it would need too many registers.
  constexpr bool kReadsFirst = sizeof(T) == 2;
  Vector<T> before[kReadsFirst ? kOuts : 1];
  const auto read = [&](int at) {
    const int64_t t = token(at / kPerOut);
    return load_vector(static_cast<const T*>(p.out) + (t < 0 ? 0 : t) * p.out_stride, column0 + at % kPerOut * kVector<T>,
                       t < 0 || !p.adds ? 0 : p.columns, p.out_aligned);
  };
#pragma unroll
  for (int v = 0; kReadsFirst && v < kOuts; ++v) before[v] = read(threadIdx.x + v * kThreads);
  __syncthreads();

  const int warp = threadIdx.x / 32, rows = warp % 2 * 32, columns = warp / 2 * 32;
  const int own_row = threadIdx.x / 2, own_k = threadIdx.x % 2 * (kDepth / 2);  // of the coefficients
  const int64_t own_token = token(own_row);
  const auto copy = [&](T* a, int i, int64_t k0) {
    T* b = a + kSizeA;
    copy_values<T, kDepth / 2>(a + own_row * kStrideA + own_k, p, own_token, i, k0 + own_k);
    const T* factor = static_cast<const T*>(p.factor) + i * p.expert_stride;
    constexpr int kPerRow = (kTransposed ? kN : kDepth) / kVector<T>;
#pragma unroll
    for (int at = threadIdx.x; at < kN * kDepth / kVector<T>; at += kThreads) {
      const int row = at / kPerRow, along = at % kPerRow * kVector<T>;
      const int64_t line = (kTransposed ? k0 : column0) + row, from = (kTransposed ? column0 : k0) + along;
      const int64_t lines = kTransposed ? p.rank : p.columns, length = kTransposed ? p.columns : p.rank;
      copy_vector(b + row * kStrideB + along, line < lines ? factor + line * length : nullptr, from, length, p.factor_aligned);
    }
  };
  WarpTile<T, 32, 32> sum;
  int64_t k0 = 0;
  int i = next_present(present, 0), stage = 0;
  if (i < kMostExperts) copy(operands, i, k0);
  end_of_copies();
  while (i < kMostExperts) {
    const T *a = operands + stage * kSize, *b = a + kSizeA;
    k0 += kDepth;
    if (k0 >= p.rank) i = next_present(present, i + 1), k0 = 0;
    stage ^= 1;
    if (i < kMostExperts) copy(operands + stage * kSize, i, k0);
    end_of_copies();
    wait_for_copies<1>();
    __syncthreads();
    sum.template multiply_add<false, kTransposed>(a + rows * kStrideA, kStrideA,
                                                  b + (kTransposed ? columns : columns * kStrideB), kStrideB, kDepth);
    __syncthreads();
  }
  float* sums = reinterpret_cast<float*>(memory);  // [kM][kStrideOut]
  sum.for_each([&](int row, int column, float value) { sums[(rows + row) * kStrideOut + columns + column] = value; });
  __syncthreads();
#pragma unroll(kReadsFirst ? kOuts : 1)
  for (int each = 0; each < kOuts; ++each) {
    const int at = threadIdx.x + each * kThreads, row = at / kPerOut, along = at % kPerOut * kVector<T>;
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
    Vector<T> result = kReadsFirst ? before[kReadsFirst ? each : 0] : read(at);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) result.lane[v] = from_float<T>(value[v] + to_float(result.lane[v]));
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
  const void* values;  // c_e, [entries, padded(rank)] in the type of x
  int64_t rank;
  const void* x;  // [T, width], token t at t * x_stride
  int64_t x_stride, width;
  bool x_aligned;
  // Element (i, k, d) at i * expert_stride + k * rank_stride + d * width_stride, for k < out_rank; zero from rank on.
  void* out;
  int64_t out_rank, expert_stride, rank_stride, width_stride;
  const int32_t *entries, *offsets;
  int64_t num_experts_per_tok;
};

// A tile of 32 ranks x 64 columns of one expert's gradient, over all its entries in order, copied one pass ahead.
template <class T> __global__ void __launch_bounds__(kThreads) accumulate_kernel(Accumulation p) {
  constexpr int kM = 32, kN = 64, kEntries = 32, kPad = kVector<T>;
  constexpr int kStrideA = kM + kPad, kStrideB = kN + kPad, kStrideOut = kN + 4;
  constexpr int kSizeA = kEntries * kStrideA, kSize = kSizeA + kEntries * kStrideB;
  constexpr int kBytes = 2 * kSize * int(sizeof(T)), kOutBytes = int(2 * kM * kStrideOut * sizeof(float));
  SMILE_SHARED(unsigned char, memory, [kBytes > kOutBytes ? kBytes : kOutBytes]);
  T* const operands = reinterpret_cast<T*>(memory);

  const int64_t d0 = blockIdx.x * int64_t(kN), rank0 = blockIdx.y * int64_t(kM), stride = padded(p.rank);
  const int i = blockIdx.z, begin = p.offsets[i], end = p.offsets[i + 1];
  const int warp = threadIdx.x / 32, columns = warp % 2 * 32, part = warp / 2;
  const auto copy = [&](T* a, int e0) {
    T* b = a + kSizeA;
#pragma unroll
    for (int at = threadIdx.x; at < kEntries * kM / kVector<T>; at += kThreads) {
      const int row = at / (kM / kVector<T>), along = at % (kM / kVector<T>) * kVector<T>, place = e0 + row;
      const T* values = static_cast<const T*>(p.values);
      if (place < end) values += p.entries[place] * stride;
      copy_vector(a + row * kStrideA + along, place < end ? values : nullptr, rank0 + along, stride, true);
    }
#pragma unroll
    for (int at = threadIdx.x; at < kEntries * kN / kVector<T>; at += kThreads) {
      const int row = at / (kN / kVector<T>), along = at % (kN / kVector<T>) * kVector<T>, place = e0 + row;
      const T* x = static_cast<const T*>(p.x);
      if (place < end) x += p.entries[place] / p.num_experts_per_tok * p.x_stride;
      copy_vector(b + row * kStrideB + along, place < end ? x : nullptr, d0 + along, p.width, p.x_aligned);
    }
  };
  WarpTile<T, 32, 32> sum;
  if (begin < end) copy(operands, begin);
  end_of_copies();
  for (int e0 = begin, stage = 0; e0 < end; e0 += kEntries) {
    const T *a = operands + stage * kSize, *b = a + kSizeA;
    stage ^= 1;
    if (e0 + kEntries < end) copy(operands + stage * kSize, e0 + kEntries);
    end_of_copies();
    wait_for_copies<1>();
    __syncthreads();
    constexpr int kHalf = kEntries / 2;
    sum.template multiply_add<true, true>(a + part * kHalf * kStrideA, kStrideA, b + part * kHalf * kStrideB + columns,
                                          kStrideB, kHalf);
    __syncthreads();
  }
  float* sums = reinterpret_cast<float*>(memory);  // [2][kM][kStrideOut]: half of the entries each
  sum.for_each([&](int row, int column, float value) { sums[(part * kM + row) * kStrideOut + columns + column] = value; });
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

// ---- parts of a call that several files launch ----

void group(const Sizes& n, const int32_t* ids, const Groups& groups, void* stream);

// The layout of q: [splits, tokens, N, columns], for each expert its router rows' products, and, where the experts are
// projected too, those of its vh from column `h` on.
struct Layout {
  bool with_experts;
  int64_t splits, tokens, columns, h;  // tokens: how many at once
};
Layout layout_of(const Forward& p);
Projection rows_of(DType dtype, const Forward& p, const Layout& layout, float* q);  // of all tokens

// Writes weights and ids, and with experts h and z.
void route(DType dtype, const Forward& p, const Scratch& scratch, void* stream);

// Few tokens: products of all tokens with all rows into q; a whole call.
void few_rows(DType dtype, const Projection& p, void* stream);
void few_forward(DType dtype, const Forward& p, const Scratch& scratch, void* stream);

}  // namespace smile
