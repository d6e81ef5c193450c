// Forward on a GPU. Many tokens: route; group entries by expert; h = vh x; expand and add to the base product of cuBLAS.
// Few tokens: router rows; route and h; then y in one pass over W, with the experts in the same sums.
#include "products.cuh"

namespace smile {

// ---- grouping ----

// Block i finds expert i's offset by counting all ids, then lists its entries in order; so no block waits for another.
static __global__ void __launch_bounds__(kThreads) group_kernel(Sizes n, const int32_t* ids, Groups groups, int tiles) {
  SMILE_SHARED(int, count, [kMostExperts]);
  SMILE_SHARED(int, taken, [kWarps]);
  const int i = blockIdx.x, experts = int(n.num_experts), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t total = n.tokens * n.num_experts_per_tok;
  for (int e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < total; e += kThreads)
    if (is_expert(ids[e], experts)) atomicAdd(&count[ids[e]], 1);
  __syncthreads();
  int begin = 0, tile = 0;
  for (int e = 0; e < i; ++e) {
    begin += count[e];
    tile += (count[e] + kTileEntries - 1) / kTileEntries;
  }
  const int end = begin + count[i], own_tiles = (count[i] + kTileEntries - 1) / kTileEntries;
  const bool last = i == experts - 1;  // which also marks the unused tiles
  for (int k = tile + threadIdx.x; k < (last ? tiles : tile + own_tiles); k += kThreads) {
    const int from = begin + (k - tile) * kTileEntries;
    groups.tiles[3 * k] = k < tile + own_tiles ? i : -1;
    groups.tiles[3 * k + 1] = from;
    groups.tiles[3 * k + 2] = from + kTileEntries < end ? from + kTileEntries : end;
  }
  if (threadIdx.x == 0) groups.offsets[i] = begin;
  if (threadIdx.x == 0 && last) groups.offsets[experts] = end;
  for (int64_t k = end + threadIdx.x; last && k < total; k += kThreads) groups.entries[k] = -1;

  for (int64_t e0 = 0; e0 < total; e0 += kThreads) {
    const int64_t e = e0 + threadIdx.x;
    const bool mine = e < total && ids[e] == i;
    const unsigned of_warp = __ballot_sync(kAllLanes, mine);
    if (lane == 0) taken[warp] = __popc(of_warp);
    __syncthreads();
    int before = __popc(of_warp & ((1u << lane) - 1)), in_all = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? taken[w] : 0;
      in_all += taken[w];
    }
    if (mine) groups.entries[begin + before] = int32_t(e);
    begin += in_all;
    __syncthreads();
  }
}

void cuda_group(const Sizes& n, const int32_t* ids, const Groups& groups, void* stream) {
  SMILE_LAUNCH(group_kernel, unsigned(n.num_experts), kThreads, stream, n, ids, groups, int(tile_count(n)));
}

// ---- the router's rows ----

constexpr int kFew = 8;  // tokens

// sum[r][t] += the lane's share of rows[r] . x_t, for tokens of stride x_stride.
template <class T, int kRows>
__device__ __forceinline__ void few_dots(const T* const (&rows)[kRows], const T* x, int64_t x_stride, int64_t tokens, int64_t depth,
                                         bool is_aligned, int lane, int lanes, float (&sum)[kRows][kFew]) {
  for (int64_t d = int64_t(lane) * kVector<T>; d < depth; d += int64_t(lanes) * kVector<T>) {
    Vector<T> row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = load_vector(rows[r], d, depth, is_aligned);
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      if (t >= tokens) break;
      const Vector<T> column = load_vector(x + t * x_stride, d, depth, is_aligned);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) sum[r][t] += to_float(row[r].lane[v]) * to_float(column.lane[v]);
    }
  }
}

// q[t, row] for the router row of this block; its warps split the depth.
template <class T> __global__ void __launch_bounds__(kThreads) few_router_rows_kernel(Forward p, bool is_aligned, float* q) {
  SMILE_SHARED(float, parts, [kWarps][kFew]);
  const Sizes& n = p.n;
  const int64_t i = blockIdx.x / n.rank_of_router, k = blockIdx.x % n.rank_of_router;
  const T* rows[1] = {static_cast<const T*>(p.router) + i * p.router_expert_stride + k * n.in_features};
  float sum[1][kFew] = {};
  few_dots(rows, static_cast<const T*>(p.x), p.x_stride[0], n.tokens, n.in_features, is_aligned, threadIdx.x, kThreads, sum);
#pragma unroll
  for (int t = 0; t < kFew; ++t) {
    const float all = warp_sum(sum[0][t]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][t] = all;
  }
  __syncthreads();
  if (threadIdx.x < n.tokens) {
    float all = 0;
    for (int w = 0; w < kWarps; ++w) all += parts[w][threadIdx.x];
    q[threadIdx.x * n.num_experts * n.rank_of_router + blockIdx.x] = all;
  }
}

template <class T> static void few_router_rows(const Forward& p, float* q, void* stream) {
  const Sizes& n = p.n;
  const bool is_aligned = aligned<T>(p.x, p.x_stride[0]) && aligned<T>(p.router, n.in_features) &&
                          aligned<T>(p.router, p.router_expert_stride);
  SMILE_LAUNCH(few_router_rows_kernel<T>, unsigned(n.num_experts * n.rank_of_router), kThreads, stream, p, is_aligned, q);
}

static __global__ void __launch_bounds__(kThreads) choose_kernel(Sizes n, const float* q, int64_t tokens, float* weights, int32_t* ids) {
  const int64_t t = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32, m = n.num_experts_per_tok;
  if (t < tokens) choose(q + t * n.num_experts * n.rank_of_router, n, weights + t * m, ids + t * m);
}

template <class T> static void many_router_rows(const Forward& p, const T* x, int64_t tokens, float* q, void* stream) {
  Projection projection{};
  projection.x = x;
  projection.x_stride = p.x_stride[0];
  projection.depth = p.n.in_features;
  projection.x_aligned = aligned<T>(x, p.x_stride[0]);
  projection.factor = p.router;
  projection.columns = p.n.rank_of_router;
  projection.expert_stride = p.router_expert_stride;
  projection.factor_aligned = aligned<T>(p.router, p.n.in_features) && aligned<T>(p.router, p.router_expert_stride);
  projection.out = q;
  projection.out_columns = p.n.num_experts * p.n.rank_of_router;
  projection.tokens = tokens;
  projection.num_experts_per_tok = 1;
  project<T, false>(projection, blocks(tokens, kTileEntries), stream);
}

// Calls use(t, tokens) for each chunk of tokens, when q holds the router's products of these tokens.
template <class T, class F> static void for_router_rows(const Forward& p, float* q, void* stream, const F& use) {
  const int64_t chunk = route_chunk(p.n);
  for (int64_t t = 0; t < p.n.tokens; t += chunk) {
    const int64_t tokens = p.n.tokens - t < chunk ? p.n.tokens - t : chunk;
    if (is_small(p.n))
      few_router_rows<T>(p, q, stream);  // so that cuda_small chooses the same experts
    else
      many_router_rows<T>(p, static_cast<const T*>(p.x) + t * p.x_stride[0], tokens, q, stream);
    use(t, tokens);
  }
}

void cuda_route(DType dtype, const Forward& p, float* q, void* stream) {
  const int64_t m = p.n.num_experts_per_tok;
  with_type(dtype, [&](auto type) {
    for_router_rows<decltype(type)>(p, q, stream, [&](int64_t t, int64_t tokens) {
      SMILE_LAUNCH(choose_kernel, blocks(tokens, kWarps), kThreads, stream, p.n, q, tokens,
                   static_cast<float*>(p.weights) + t * m, p.ids + t * m);
    });
  });
}

// ---- one step of a routing policy ----

static __global__ void __launch_bounds__(kThreads) energies_kernel(Sizes n, const float* q, int64_t count, float* energies) {
  const int64_t at = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (at >= count) return;
  float sum = 0;
  for (int64_t k = 0; k < n.rank_of_router; ++k) sum += q[at * n.rank_of_router + k] * q[at * n.rank_of_router + k];
  energies[at] = sum;
}

// By one warp: p_i = E_i / sum_j E_j of token t; 0 on padding. NaN counts as 0.
static __device__ __forceinline__ void shares_of(const Evidence& p, int64_t t, float (&share)[kEach]) {
  const bool counts = p.real == nullptr || p.real[t];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = threadIdx.x % 32 + 32 * k;
    const float energy = counts && i < p.num_experts ? static_cast<const float*>(p.energies)[t * p.num_experts + i] : 0;
    share[k] = energy == energy ? fminf(energy, float(kMostEnergy)) : 0;
    sum += share[k];
  }
  sum = fmaxf(warp_sum(sum), FLT_MIN);
#pragma unroll
  for (int k = 0; k < kEach; ++k) share[k] = share[k] > 0 ? fmaxf(share[k] / sum, float(kLeastShare)) : 0;
}

// By one warp: sums, evidence and choice of one row.
static __device__ __forceinline__ void write_row(const Evidence& p, int64_t row, const double (&exact)[kEach]) {
  const float *prior = static_cast<const float*>(p.prior), *below = static_cast<const float*>(p.below);
  float *sums = static_cast<float*>(p.sums) + row * p.num_experts, *logs = static_cast<float*>(p.evidence) + row * p.num_experts;
  const int lane = threadIdx.x % 32;
  float sum[kEach], log[kEach], total = 0, present = 0, largest = -INFINITY;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = lane + 32 * k;
    sum[k] = float(exact[k]);
    log[k] = 0;
    if (i >= p.num_experts) continue;
    sums[i] = sum[k];
    log[k] = logf(fmaxf(sum[k], float(kLeastShare))) - (prior != nullptr ? prior[i] : 0);
    if (sum[k] > 0) total += log[k], present += 1;
  }
  if (p.accumulates) {
    total = warp_sum(total), present = warp_sum(present);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t i = lane + 32 * k;
      if (i >= p.num_experts) continue;
      if (!(sum[k] > 0)) log[k] = present > 0 ? total / present : 0;
      if (below != nullptr) log[k] += below[row * p.num_experts + i];
      largest = fmaxf(largest, log[k]);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
#pragma unroll
    for (int k = 0; k < kEach; ++k) log[k] -= below != nullptr ? largest : 0;
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (lane + 32 * k < p.num_experts) logs[lane + 32 * k] = log[k];
  const int64_t m = p.num_experts_per_tok;
  choose(log, p.num_experts, int(m), static_cast<float*>(p.weights) + row * m, p.ids + row * m);
}

// One warp per token; or one block per sequence, whose warps sum consecutive runs of tokens, then add the sums before them.
static __global__ void __launch_bounds__(kThreads) evidence_kernel(Evidence p) {
  SMILE_SHARED(double, of_warp, [kWarps][kMostExperts]);
  SMILE_SHARED(double, left, [kWarps]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float share[kEach];
  double sum[kEach];
  if (p.scope == Scope::token) {
    const int64_t t = blockIdx.x * int64_t(kWarps) + warp;
    if (t >= p.sequences * p.tokens) return;
    shares_of(p, t, share);
#pragma unroll
    for (int k = 0; k < kEach; ++k) sum[k] = share[k];
    write_row(p, t, sum);
    return;
  }
  const bool causal = p.scope == Scope::causal;
  const int64_t b = blockIdx.x, run = (p.tokens + kWarps - 1) / kWarps;
  const int64_t begin = warp * run, end = begin + run < p.tokens ? begin + run : p.tokens;
  const auto factor_of = [&](int64_t t) {
    return p.factors != nullptr ? double(p.factors[b * p.factor_strides[0] + t * p.factor_strides[1]]) : 1.0;
  };
  double rest = 1;
#pragma unroll
  for (int k = 0; k < kEach; ++k) sum[k] = 0;
  for (int64_t t = begin; t < end; ++t) {
    const double factor = factor_of(t);
    shares_of(p, b * p.tokens + t, share);
#pragma unroll
    for (int k = 0; k < kEach; ++k) sum[k] = causal ? factor * sum[k] + share[k] : sum[k] + factor * share[k];
    rest *= factor;
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) of_warp[warp][lane + 32 * k] = sum[k];
  if (lane == 0) left[warp] = rest;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = lane + 32 * k;
    sum[k] = p.before != nullptr && i < p.num_experts ? static_cast<const float*>(p.before)[b * p.num_experts + i] : 0;
    for (int w = 0; w < (causal ? warp : kWarps); ++w) sum[k] = (causal ? left[w] * sum[k] : sum[k]) + of_warp[w][i];
  }
  if (!causal && warp == 0) write_row(p, b, sum);
  for (int64_t t = begin; causal && t < end; ++t) {
    const double factor = factor_of(t);
    shares_of(p, b * p.tokens + t, share);
#pragma unroll
    for (int k = 0; k < kEach; ++k) sum[k] = factor * sum[k] + share[k];
    write_row(p, b * p.tokens + t, sum);
  }
}

void cuda_evidence(DType dtype, const Forward& p, const Evidence& e, float* q, void* stream) {
  const int64_t n = p.n.num_experts;
  with_type(dtype, [&](auto type) {
    for_router_rows<decltype(type)>(p, q, stream, [&](int64_t t, int64_t tokens) {
      SMILE_LAUNCH(energies_kernel, blocks(tokens * n, kThreads), kThreads, stream, p.n, q, tokens * n,
                   static_cast<float*>(e.energies) + t * n);
    });
  });
  const unsigned grid = e.scope == Scope::token ? blocks(p.n.tokens, kWarps) : unsigned(e.sequences);
  if (grid > 0) SMILE_LAUNCH(evidence_kernel, grid, kThreads, stream, e);
}

// ---- apply ----

template <class T> static void apply(const Forward& p, const Groups& groups, void* stream) {
  const Sizes& n = p.n;
  Projection shrink{};
  shrink.x = p.x;
  shrink.x_stride = p.x_stride[0];
  shrink.depth = n.in_features;
  shrink.x_aligned = aligned<T>(p.x, p.x_stride[0]);
  shrink.factor = p.vh;
  shrink.columns = shrink.out_columns = n.rank_of_expert;
  shrink.expert_stride = n.vh_rows * n.in_features;
  shrink.factor_aligned = aligned<T>(p.vh, n.in_features);
  shrink.out = static_cast<float*>(p.h);
  shrink.tiles = groups.tiles;
  shrink.entries = groups.entries;
  shrink.num_experts_per_tok = n.num_experts_per_tok;
  project<T, false>(shrink, tile_count(n), stream);

  Expansion expansion{};
  const float *h = static_cast<float*>(p.h), *weights = static_cast<float*>(p.weights);
  expansion.coefficients = {h, weights, static_cast<const float*>(p.s), n.rank_of_expert};
  expansion.factor = p.u;
  expansion.columns = n.out_features;
  expansion.expert_stride = p.u_stride;
  expansion.factor_aligned = aligned<T>(p.u, n.rank_of_expert) && aligned<T>(p.u, p.u_stride);
  expansion.bias = p.expert_bias;
  expansion.bias_stride = p.expert_bias_stride;
  expansion.weights = weights;
  expansion.out = p.y;
  expansion.out_stride = p.y_stride;
  expansion.out_aligned = aligned<T>(p.y, p.y_stride);
  expansion.adds = true;
  expansion.ids = p.ids;
  expansion.order = n.num_experts_per_tok == 1 ? groups.entries : nullptr;  // tokens of one expert together
  expansion.tokens = n.tokens;
  expansion.num_experts = n.num_experts;
  expansion.num_experts_per_tok = n.num_experts_per_tok;
  expand<T, false>(expansion, stream);
}

void cuda_apply(DType dtype, const Forward& p, const Groups& groups, void* stream) {
  with_type(dtype, [&](auto type) { apply<decltype(type)>(p, groups, stream); });
}

// ---- a few tokens ----

// h[e, k] for entry e = blockIdx.y, one warp per row. Every block routes for itself; the first of a token stores the result.
template <class T> __global__ void __launch_bounds__(kThreads) few_h_kernel(Forward p, bool is_aligned, const float* q) {
  constexpr int kMostSlots = 64;
  SMILE_SHARED(float, own_weights, [kMostSlots]);
  SMILE_SHARED(int32_t, own_ids, [kMostSlots]);
  const Sizes& n = p.n;
  const int64_t m = n.num_experts_per_tok, e = blockIdx.y, t = e / m, j = e % m;
  if (p.router != nullptr) {
    if (threadIdx.x < 32) choose(q + t * n.num_experts * n.rank_of_router, n, own_weights, own_ids);
    __syncthreads();
    if (blockIdx.x == 0 && j == 0 && threadIdx.x < m) {
      static_cast<float*>(p.weights)[e + threadIdx.x] = own_weights[threadIdx.x];
      p.ids[e + threadIdx.x] = own_ids[threadIdx.x];
    }
  }
  const int64_t k = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32;
  if (k >= n.rank_of_expert) return;
  const int64_t id = p.router != nullptr ? own_ids[j] : p.ids[e];
  if (!is_expert(id, n.num_experts)) {
    if (threadIdx.x % 32 == 0) static_cast<float*>(p.h)[e * n.rank_of_expert + k] = 0;
    return;
  }
  const T* rows[1] = {static_cast<const T*>(p.vh) + (id * n.vh_rows + k) * n.in_features};
  float sum[1][kFew] = {};
  few_dots(rows, static_cast<const T*>(p.x) + t * p.x_stride[0], 0, 1, n.in_features, is_aligned, threadIdx.x % 32, 32, sum);
  const float all = warp_sum(sum[0][0]);
  if (threadIdx.x % 32 == 0) static_cast<float*>(p.h)[e * n.rank_of_expert + k] = all;
}

// y[:, o], two outputs o per warp: W's rows, if y does not hold their product, then the chosen experts' rows of u, added to
// the same sums.
template <class T> __global__ void __launch_bounds__(kThreads) few_y_kernel(Forward p, bool is_aligned) {
  constexpr int kRows = 2;
  const Sizes& n = p.n;
  const int lane = threadIdx.x % 32;
  const int64_t m = n.num_experts_per_tok, r = n.rank_of_expert, last = n.out_features - 1;
  const int64_t o = (blockIdx.x * int64_t(kWarps) + threadIdx.x / 32) * kRows;
  if (o > last) return;
  const int64_t at[kRows] = {o, o < last ? o + 1 : last};
  const T* rows[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row)
    rows[row] = p.weight != nullptr ? static_cast<const T*>(p.weight) + at[row] * n.in_features : nullptr;
  float sum[kRows][kFew] = {};
  const int64_t depth = p.weight != nullptr ? n.in_features : 0;
  few_dots(rows, static_cast<const T*>(p.x), p.x_stride[0], n.tokens, depth, is_aligned, lane, 32, sum);
#pragma unroll
  for (int t = 0; t < kFew; ++t) {
    if (t >= n.tokens) break;
    for (int64_t e = t * m; e < (t + 1) * m; ++e) {
      const int64_t id = p.ids[e];
      if (!is_expert(id, n.num_experts)) continue;
      const float w = static_cast<const float*>(p.weights)[e];
      const float *h = static_cast<const float*>(p.h) + e * r, *s = static_cast<const float*>(p.s) + id * r;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const T* u = static_cast<const T*>(p.u) + id * p.u_stride + at[row] * r;
        for (int64_t k = lane; k < r; k += 32) sum[row][t] += w * s[k] * h[k] * to_float(u[k]);
        if (lane == 0 && p.expert_bias != nullptr)
          sum[row][t] += w * to_float(static_cast<const T*>(p.expert_bias)[id * p.expert_bias_stride + at[row]]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float all = warp_sum(sum[row][t]);
      if (p.bias != nullptr) all += to_float(static_cast<const T*>(p.bias)[at[row]]);
      T& y = static_cast<T*>(p.y)[t * p.y_stride + at[row]];
      if (lane == 0 && (row == 0 || o < last)) y = from_float<T>(p.weight != nullptr ? all : all + to_float(y));
    }
  }
}

template <class T> static void small(const Forward& p, float* q, void* stream) {
  const Sizes& n = p.n;
  const int64_t d = n.in_features, entries = n.tokens * n.num_experts_per_tok;
  const bool x_aligned = aligned<T>(p.x, p.x_stride[0]) && d % kVector<T> == 0;
  if (p.router != nullptr) few_router_rows<T>(p, q, stream);
  const dim3 grid(blocks(n.rank_of_expert, kWarps), unsigned(entries));
  SMILE_LAUNCH(few_h_kernel<T>, grid, kThreads, stream, p, x_aligned && aligned<T>(p.vh, d), q);
  SMILE_LAUNCH(few_y_kernel<T>, blocks(n.out_features, 2 * kWarps), kThreads, stream, p, x_aligned && aligned<T>(p.weight, d));
}

void cuda_small(DType dtype, const Forward& p, float* q, void* stream) {
  with_type(dtype, [&](auto type) { small<decltype(type)>(p, q, stream); });
}

}  // namespace smile
