// Few tokens on a GPU: products of x with the rows of the router and of the experts; then every output in one pass over W,
// where each block chooses the experts of its tokens for itself. The second launch reads W while the first one still runs.
#include "products.cuh"

namespace smile {

// With two blocks to a multiprocessor no kernel here spills registers.
constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32, kFewTokens = 16, kAhead = 4;

// ---- 16 tokens x a few rows, by a block ----

// 16 bytes of numbers of 16 bits, in pairs.
struct __align__(16) Pairs { unsigned of[4]; };

// sums[t][row] = this warp's share of x_t . row, of every eighth piece of the depth. x_at and row_at return null where there
// is no such token or row. A lane's four loads of a row are 16 bytes each, and all are issued before the first product:
// any piece of 32 numbers may be multiplied in any order of its columns, as long as x and the rows have the same.
template <class T, int kRows, class XAt, class RowAt>
__device__ __forceinline__ void few_products(const XAt& x_at, const RowAt& row_at, int64_t depth, bool vectors,
                                             float (&sums)[kFewTokens][kRows]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (kTensorCores<T>) {
    constexpr int kLoads = 2 + kRows / 8, kStep = 4 * kVector<T>;
    const T* from[kLoads] = {x_at(lane / 4), x_at(lane / 4 + 8)};
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) from[2 + n] = row_at(8 * n + lane / 4);
    float c[kRows / 8][4] = {};
    const auto multiply = [&](const Pairs (&v)[kLoads]) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const unsigned a[4] = {v[0].of[half], v[1].of[half], v[0].of[half + 1], v[1].of[half + 1]};
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) multiply_add<T>(c[n], a, v[2 + n].of[half], v[2 + n].of[half + 1]);
      }
    };
    int64_t d = warp * kStep + lane % 4 * kVector<T>;
    for (; vectors && d - lane % 4 * kVector<T> < depth; d += kAhead * kFewWarps * kStep) {
      Pairs v[kAhead][kLoads];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int64_t at = d + k * kFewWarps * kStep;
          v[k][i] = from[i] != nullptr && at < depth ? *reinterpret_cast<const Pairs*>(from[i] + at) : Pairs{};
        }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) multiply(v[k]);
    }
    for (; !vectors && d - lane % 4 * kVector<T> < depth; d += kFewWarps * kStep) {
      Pairs v[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const Vector<T> numbers = load_vector(from[i], d, from[i] == nullptr ? 0 : depth, false);
        v[i] = *reinterpret_cast<const Pairs*>(&numbers);
      }
      multiply(v);
    }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[lane / 4 + v / 2 * 8][8 * n + lane % 4 * 2 + v % 2] = c[n][v];
  } else {
    constexpr int kTokens = 8;
#pragma unroll 1
    for (int t0 = 0; t0 < kFewTokens; t0 += kTokens)
#pragma unroll 1
      for (int r0 = 0; r0 < kRows; r0 += kAhead) {
        float sum[kTokens][kAhead] = {};
        for (int64_t d = threadIdx.x * kVector<T>; d < depth; d += kFewThreads * kVector<T>) {
          Vector<T> row[kAhead];
#pragma unroll
          for (int r = 0; r < kAhead; ++r) {
            const T* from = row_at(r0 + r);
            row[r] = load_vector(from, d, from == nullptr ? 0 : depth, vectors);
          }
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            const T* from = x_at(t0 + t);
            if (from == nullptr) break;
            const Vector<T> x = load_vector(from, d, depth, vectors);
#pragma unroll
            for (int r = 0; r < kAhead; ++r)
#pragma unroll
              for (int v = 0; v < kVector<T>; ++v) sum[t][r] += to_float(x.lane[v]) * to_float(row[r].lane[v]);
          }
        }
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int r = 0; r < kAhead; ++r) {
            const float all = warp_sum(sum[t][r]);
            if (lane == 0) sums[t0 + t][r0 + r] = all;
          }
      }
  }
}

// ---- the rows of the router and of the experts ----

template <class T> __global__ void __launch_bounds__(kFewThreads, 2) few_rows_kernel(Projection p) {
  constexpr int kRows = 8;
  SMILE_SHARED(float, sums, [kFewWarps][kFewTokens][kRows]);
  let_next_start();
  const int64_t t0 = blockIdx.y * int64_t(kFewTokens), c0 = blockIdx.x * int64_t(kRows);
  const T *first = static_cast<const T*>(p.first), *second = static_cast<const T*>(p.second);
  few_products<T, kRows>(
      [&](int t) { return t0 + t < p.tokens ? static_cast<const T*>(p.x) + (t0 + t) * p.x_stride : nullptr; },
      [&](int row) { return row_of(p, first, second, c0 + row); }, p.depth, p.x_aligned && p.factor_aligned,
      sums[threadIdx.x / 32]);
  __syncthreads();
  const int t = threadIdx.x / kRows, row = threadIdx.x % kRows;
  if (t >= kFewTokens || t0 + t >= p.tokens || c0 + row >= p.out_columns) return;
  float sum = 0;
  for (int w = 0; w < kFewWarps; ++w) sum += sums[w][t][row];
  p.out[(t0 + t) * p.out_columns + c0 + row] = sum;
}

template <class T> static void few_rows(const Projection& p, void* stream) {
  SMILE_LAUNCH(few_rows_kernel<T>, dim3(blocks(p.out_columns, 8), blocks(p.tokens, kFewTokens)), kFewThreads, stream, p);
}

void few_rows(DType dtype, const Projection& p, void* stream) {
  with_type(dtype, [&](auto type) { few_rows<decltype(type)>(p, stream); });
}

// ---- h of the chosen experts ----

// h[e, k] for entry e = blockIdx.y and 8 ranks k. Every block routes for itself; the first of a token stores the result.
template <class T> __global__ void __launch_bounds__(kFewThreads, 2) few_h_kernel(Forward p, bool vectors, const float* q) {
  constexpr int kRows = 8;
  SMILE_SHARED(float, sums, [kFewWarps][kFewTokens][kRows]);
  SMILE_SHARED(float, own_weights, [kMostFewSlots]);
  SMILE_SHARED(int32_t, own_ids, [kMostFewSlots]);
  let_next_start();
  const Sizes& n = p.n;
  const int64_t m = n.num_experts_per_tok, e = blockIdx.y, t = e / m, j = e % m, d = n.in_features, g = n.rank_of_router;
  if (p.router != nullptr) {
    if (threadIdx.x < 32) choose(q + t * n.num_experts * g, g, n, own_weights, own_ids);
    __syncthreads();
    if (blockIdx.x == 0 && j == 0 && threadIdx.x < m) {
      static_cast<float*>(p.weights)[e + threadIdx.x] = own_weights[threadIdx.x];
      p.ids[e + threadIdx.x] = own_ids[threadIdx.x];
    }
  }
  const int32_t id = p.router != nullptr ? own_ids[j] : p.ids[e];
  const int64_t k0 = blockIdx.x * int64_t(kRows), rows = is_expert(id, n.num_experts) ? n.rank_of_expert - k0 : 0;
  const T *factor = static_cast<const T*>(p.vh) + (rows > 0 ? id * n.vh_rows + k0 : 0) * d;
  few_products<T, kRows>([&](int row) { return row == 0 ? static_cast<const T*>(p.x) + t * p.x_stride[0] : nullptr; },
                         [&](int row) { return row < rows ? factor + row * d : nullptr; }, d, vectors, sums[threadIdx.x / 32]);
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= kRows || k0 + k >= n.rank_of_expert) return;
  float sum = 0;
  for (int w = 0; w < kFewWarps; ++w) sum += sums[w][0][k];
  static_cast<float*>(p.h)[e * n.rank_of_expert + k0 + k] = k < rows ? sum : 0;
}

// ---- the outputs ----

// What few_y_kernel reads: q [T, N, columns], with h from column `h` on; null: weights, ids and h are already there.
struct Chosen {
  const float* q;
  int64_t columns, h;
};

// y of 16 tokens x 16 outputs: W's rows, if y does not hold their product; then the experts, added to the same sums.
template <class T>
__global__ void __launch_bounds__(kFewThreads, 2) few_y_kernel(Forward p, Chosen chosen, bool vectors, bool u_vectors) {
  constexpr int kRows = 16;
  SMILE_SHARED(float, sums, [kFewWarps][kFewTokens][kRows]);
  SMILE_SHARED(float, own_weights, [kFewTokens][kMostFewSlots]);
  SMILE_SHARED(int32_t, own_ids, [kFewTokens][kMostFewSlots]);
  const Sizes& n = p.n;
  const int64_t t0 = blockIdx.y * int64_t(kFewTokens), o0 = blockIdx.x * int64_t(kRows), d = n.in_features;
  const int64_t m = n.num_experts_per_tok, r = n.rank_of_expert, left = n.tokens - t0;
  const int64_t tokens = left < kFewTokens ? left : kFewTokens;
  if (p.weight != nullptr)
    few_products<T, kRows>(
        [&](int t) { return t < tokens ? static_cast<const T*>(p.x) + (t0 + t) * p.x_stride[0] : nullptr; },
        [&](int row) { return o0 + row < n.out_features ? static_cast<const T*>(p.weight) + (o0 + row) * d : nullptr; }, d,
        vectors, sums[threadIdx.x / 32]);
  wait_for_previous();
  const auto q_of = [&](int64_t t) { return chosen.q + (t0 + t) * n.num_experts * chosen.columns; };
  if (chosen.q != nullptr)
    for (int t = threadIdx.x / 32; t < tokens; t += kFewWarps) choose(q_of(t), chosen.columns, n, own_weights[t], own_ids[t]);
  for (int at = threadIdx.x; chosen.q == nullptr && at < tokens * m; at += kFewThreads) {
    own_weights[at / m][at % m] = static_cast<const float*>(p.weights)[t0 * m + at];
    own_ids[at / m][at % m] = p.ids[t0 * m + at];
  }
  __syncthreads();
  if (chosen.q != nullptr && blockIdx.x == 0) {
    for (int at = threadIdx.x; at < tokens * m; at += kFewThreads) {
      static_cast<float*>(p.weights)[t0 * m + at] = own_weights[at / m][at % m];
      p.ids[t0 * m + at] = own_ids[at / m][at % m];
    }
    for (int64_t at = threadIdx.x; at < tokens * m * r; at += kFewThreads)
      static_cast<float*>(p.h)[t0 * m * r + at] =
          q_of(at / (m * r))[own_ids[at / (m * r)][at / r % m] * chosen.columns + chosen.h + at % r];
  }
  const int t = threadIdx.x / kRows, row = threadIdx.x % kRows;
  const int64_t o = o0 + row;
  if (t >= tokens || o >= n.out_features) return;
  float sum = 0;
  for (int w = 0; p.weight != nullptr && w < kFewWarps; ++w) sum += sums[w][t][row];
  for (int64_t j = 0; j < m; ++j) {
    const int64_t id = own_ids[t][j];
    if (!is_expert(int32_t(id), n.num_experts)) continue;
    const float* h = chosen.q != nullptr ? q_of(t) + id * chosen.columns + chosen.h
                                         : static_cast<const float*>(p.h) + ((t0 + t) * m + j) * r;
    const float* s = static_cast<const float*>(p.s) + id * r;
    const T* u = static_cast<const T*>(p.u) + id * p.u_stride + o * r;
    float part = 0;
#pragma unroll 4
    for (int64_t k = 0; k < r; k += kVector<T>) {
      const Vector<T> numbers = load_vector(u, k, r, u_vectors);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v)
        if (k + v < r) part += s[k + v] * h[k + v] * to_float(numbers.lane[v]);
    }
    if (p.expert_bias != nullptr) part += to_float(static_cast<const T*>(p.expert_bias)[id * p.expert_bias_stride + o]);
    sum += own_weights[t][j] * part;
  }
  if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[o]);
  T& y = static_cast<T*>(p.y)[(t0 + t) * p.y_stride + o];
  y = from_float<T>(p.weight != nullptr ? sum : sum + to_float(y));
}

template <class T> static void few_forward(const Forward& p, const Layout& layout, const float* q, void* stream) {
  const Sizes& n = p.n;
  const int64_t d = n.in_features;
  const bool x_vectors = aligned<T>(p.x, p.x_stride[0]) && d % kVector<T> == 0;
  if (!layout.with_experts)
    SMILE_LAUNCH(few_h_kernel<T>, dim3(blocks(n.rank_of_expert, 8), unsigned(n.tokens * n.num_experts_per_tok)),
                 kFewThreads, stream, p, x_vectors && aligned<T>(p.vh, d), q);
  const Chosen chosen{layout.with_experts ? q : nullptr, layout.columns, layout.h};
  const dim3 grid(blocks(n.out_features, 16), blocks(n.tokens, kFewTokens));
  SMILE_LAUNCH_EARLY(few_y_kernel<T>, grid, kFewThreads, stream, p, chosen, x_vectors && aligned<T>(p.weight, d),
                     aligned<T>(p.u, n.rank_of_expert) && aligned<T>(p.u, p.u_stride));
}

void few_forward(DType dtype, const Forward& p, const Scratch& scratch, void* stream) {
  const Layout layout = layout_of(p);
  if (p.router != nullptr) few_rows(dtype, rows_of(dtype, p, layout, scratch.q), stream);
  with_type(dtype, [&](auto type) { few_forward<decltype(type)>(p, layout, scratch.q, stream); });
}

}  // namespace smile
