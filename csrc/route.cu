// Routing on a GPU: the router's rows, the choice of experts, the entries grouped by expert, and the steps of routing policies.
#include "products.cuh"

namespace smile {

// ---- grouping ----

constexpr int kGroupThreads = 1024, kGroupWarps = kGroupThreads / 32, kAhead = 8;

// Block b places the entries b * kGroupThreads + (0 to kGroupThreads - 1). It counts all entries, and those before its own,
// so no block waits for another.
static __global__ void __launch_bounds__(kGroupThreads) group_kernel(Sizes n, const int32_t* ids, Groups groups, int tiles) {
  SMILE_SHARED(int, start, [kMostExperts + 1]);       // how many entries each expert has, then where they start
  SMILE_SHARED(int, tile_start, [kMostExperts + 1]);
  SMILE_SHARED(int, earlier, [kMostExperts]);         // those before this block
  SMILE_SHARED(uint16_t, of_warp, [kGroupWarps][kMostExperts]);
  const int experts = int(n.num_experts), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t total = n.tokens * n.num_experts_per_tok, own = blockIdx.x * int64_t(kGroupThreads);
  const auto expert_of = [&](int64_t e) { return e < total && is_expert(ids[e], experts) ? ids[e] : -1; };
  for (int i = threadIdx.x; i <= experts; i += kGroupThreads) {
    start[i] = 0;
    if (i < experts) earlier[i] = 0;
  }
  for (int at = threadIdx.x; at < kGroupWarps * experts; at += kGroupThreads) of_warp[at / experts][at % experts] = 0;
  __syncthreads();
  for (int64_t e0 = 0; e0 < total; e0 += kAhead * kGroupThreads) {
    int id[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) id[k] = expert_of(e0 + k * kGroupThreads + threadIdx.x);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (e0 + k * kGroupThreads >= total) break;
      const unsigned same = __match_any_sync(kAllLanes, id[k]);
      if (id[k] < 0 || lane != __ffs(same) - 1) continue;
      atomicAdd(&start[id[k]], __popc(same));
      if (e0 + k * kGroupThreads < own) atomicAdd(&earlier[id[k]], __popc(same));
    }
  }
  const int id = expert_of(own + threadIdx.x);
  const unsigned same = __match_any_sync(kAllLanes, id);
  if (id >= 0 && lane == __ffs(same) - 1) of_warp[warp][id] = uint16_t(__popc(same));
  __syncthreads();
  for (int i = threadIdx.x; i < experts; i += kGroupThreads) {
    int before = 0;
    for (int w = 0; w < kGroupWarps; ++w) {
      const int count = of_warp[w][i];
      of_warp[w][i] = uint16_t(before);
      before += count;
    }
  }
  if (warp == 0) {  // from counts to starts; a lane has kEach experts in a row
    int count[kEach], sum = 0, tile_sum = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = lane * kEach + k;
      count[k] = i < experts ? start[i] : 0;
      sum += count[k];
      tile_sum += int((count[k] + kTileEntries - 1) / kTileEntries);
    }
    int end = sum, tile_end = tile_sum;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(kAllLanes, end, lanes), other_tile = __shfl_up_sync(kAllLanes, tile_end, lanes);
      if (lane >= lanes) end += other, tile_end += other_tile;
    }
    int begin = end - sum, tile = tile_end - tile_sum;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = lane * kEach + k;
      if (i <= experts) start[i] = begin, tile_start[i] = tile;
      begin += count[k];
      tile += int((count[k] + kTileEntries - 1) / kTileEntries);
    }
    if (lane == 31 && experts == kMostExperts) start[experts] = begin, tile_start[experts] = tile;
  }
  __syncthreads();
  const int64_t e = own + threadIdx.x;
  if (id >= 0) groups.entries[start[id] + earlier[id] + of_warp[warp][id] + __popc(same & ((1u << lane) - 1))] = int32_t(e);
  if (e >= start[experts] && e < total) groups.entries[e] = -1;
  if (e <= experts && blockIdx.x == 0) groups.offsets[e] = start[e];
  if (e >= tiles) return;
  int low = 0, high = experts;  // the expert of tile e: the last one that starts at it or before, and has tiles
  while (low < high) {
    const int middle = (low + high) / 2;
    if (tile_start[middle + 1] <= e)
      low = middle + 1;
    else
      high = middle;
  }
  const int from = low < experts ? start[low] + int(e - tile_start[low]) * int(kTileEntries) : 0;
  groups.tiles[3 * e] = low < experts ? low : -1;
  groups.tiles[3 * e + 1] = from;
  groups.tiles[3 * e + 2] = low < experts && from + kTileEntries > start[low + 1] ? start[low + 1] : from + int(kTileEntries);
}

void group(const Sizes& n, const int32_t* ids, const Groups& groups, void* stream) {
  SMILE_LAUNCH(group_kernel, blocks(n.tokens * n.num_experts_per_tok, kGroupThreads), kGroupThreads, stream, n, ids, groups,
               int(tile_count(n)));
}

// ---- products with the router's rows ----

// The experts are projected with the router where that costs few rows that no token needs: it saves a pass over x.
Layout layout_of(const Forward& p) {
  const Sizes& n = p.n;
  const int64_t g = n.rank_of_router, r = n.rank_of_expert, both = p.tied_router ? (g > r ? g : r) : g + r;
  const int64_t all = n.num_experts * both, apart = n.num_experts * g + n.num_experts_per_tok * r;
  Layout q{};
  if (p.router == nullptr) return q;
  q.with_experts = p.y != nullptr && (is_few(n) ? all <= 512 || 4 * all <= n.out_features : all <= 2 * apart + 256);
  q.columns = q.with_experts ? both : g;
  q.h = q.with_experts && !p.tied_router ? g : 0;
  // Enough blocks for a GPU, each with 256 of the depth or more. It depends on T and D alone: so do the bits of a score.
  const int64_t most = n.in_features / 256, wanted = 128 / blocks(n.tokens, kTileEntries);
  const int64_t splits = wanted < most ? wanted : most;
  q.splits = is_few(n) || splits < 1 ? 1 : splits > 16 ? 16 : splits;
  const int64_t fits = (int64_t(1) << 24) / (n.num_experts * q.columns * q.splits) + 1;
  q.tokens = is_few(n) || n.tokens < fits ? n.tokens : fits;
  return q;
}

int64_t q_size(const Forward& p) {
  const Layout q = layout_of(p);
  return q.splits * q.tokens * p.n.num_experts * q.columns;
}

Projection rows_of(DType dtype, const Forward& p, const Layout& layout, float* q) {
  const Sizes& n = p.n;
  Projection rows{};
  rows.x = p.x;
  rows.x_stride = p.x_stride[0];
  rows.depth = n.in_features;
  const bool from_vh = layout.with_experts && p.tied_router;
  rows.first = from_vh ? p.vh : p.router;
  rows.first_stride = from_vh ? n.vh_rows * n.in_features : p.router_expert_stride;
  rows.first_rows = layout.h > 0 ? layout.h : layout.columns;
  rows.second = layout.h > 0 ? p.vh : nullptr;
  rows.second_stride = n.vh_rows * n.in_features;
  rows.columns = layout.columns;
  rows.out = q;
  rows.out_columns = n.num_experts * layout.columns;
  rows.tokens = n.tokens;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    rows.x_aligned = aligned<T>(p.x, p.x_stride[0]);
    rows.factor_aligned = aligned<T>(rows.first, n.in_features) && aligned<T>(rows.first, rows.first_stride) &&
                          aligned<T>(rows.second, n.in_features);
  });
  return rows;
}

// Calls use(t, tokens, splits) for each chunk of tokens, when q holds their products.
template <class F>
static void for_products(DType dtype, const Forward& p, const Layout& layout, float* q, void* stream, const F& use) {
  Projection rows = rows_of(dtype, p, layout, q);
  if (is_few(p.n)) {
    few_rows(dtype, rows, stream);
    return use(0, p.n.tokens, 1);
  }
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t t = 0; t < p.n.tokens; t += layout.tokens) {
      rows.x = static_cast<const T*>(p.x) + t * p.x_stride[0];
      rows.tokens = p.n.tokens - t < layout.tokens ? p.n.tokens - t : layout.tokens;
      use(t, rows.tokens, project_all(dtype, rows, layout.splits, stream));
    }
  });
}

// ---- the choice ----

struct Choice {
  Sizes n;         // of the tokens in q
  float* q;        // [splits, T, N, columns]
  int64_t splits, columns, h_column;
  float* weights;  // [T, m]
  int32_t* ids;    // [T, m]
  const float* s;  // [N, r]
  float* h;        // [T, m, r]
  void* z;         // [T * m, padded(r)]; null, as is h: the choice alone
};

// One warp per token: adds the splits, in place, chooses, and reads h off the products.
template <class T> __global__ void __launch_bounds__(kThreads, 8) choose_kernel(Choice p) {
  const Sizes& n = p.n;
  const int64_t t = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32, m = n.num_experts_per_tok, r = n.rank_of_expert;
  if (t >= n.tokens) return;
  const int64_t lane = threadIdx.x % 32, count = n.num_experts * p.columns, split = n.tokens * count;
  float* q = p.q + t * count;
  if (p.splits > 1) {
#pragma unroll 4
    for (int64_t c = lane; c < count; c += 32) {
      float sum = q[c];
      for (int64_t k = 1; k < p.splits; ++k) sum += q[k * split + c];
      q[c] = sum;
    }
    __syncwarp();
  }
  float* weights = p.weights + t * m;
  int32_t* ids = p.ids + t * m;
  choose(q, p.columns, n, weights, ids);
  if (p.z == nullptr) return;
  __syncwarp();
  for (int64_t j = 0; j < m; ++j) {
    const float* h = q + ids[j] * p.columns + p.h_column;
    for (int64_t k = lane; k < padded(r); k += 32) {
      if (k < r) p.h[(t * m + j) * r + k] = h[k];
      static_cast<T*>(p.z)[(t * m + j) * padded(r) + k] = from_float<T>(k < r ? weights[j] * p.s[ids[j] * r + k] * h[k] : 0.0f);
    }
  }
}

void route(DType dtype, const Forward& p, const Scratch& scratch, void* stream) {
  const Layout layout = layout_of(p);
  const int64_t m = p.n.num_experts_per_tok, r = p.n.rank_of_expert;
  for_products(dtype, p, layout, scratch.q, stream, [&](int64_t t, int64_t tokens, int64_t splits) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      Choice choice{p.n, scratch.q, splits, layout.columns, layout.h, static_cast<float*>(p.weights) + t * m, p.ids + t * m,
                    static_cast<const float*>(p.s), nullptr, nullptr};
      choice.n.tokens = tokens;
      if (layout.with_experts) {
        choice.h = static_cast<float*>(p.h) + t * m * r;
        choice.z = static_cast<T*>(scratch.z) + t * m * padded(r);
      }
      SMILE_LAUNCH(choose_kernel<T>, blocks(tokens, kWarps), kThreads, stream, choice);
    });
  });
}

// ---- one step of a routing policy ----

static __global__ void __launch_bounds__(kThreads) energies_kernel(int64_t rank, const float* q, int64_t splits, int64_t count,
                                                                   float* energies) {
  const int64_t at = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (at >= count) return;
  float sum = 0;
  for (int64_t k = 0; k < rank; ++k) {
    float own = 0;
    for (int64_t split = 0; split < splits; ++split) own += q[(split * count + at) * rank + k];
    sum += own * own;
  }
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

// By one warp: sums, evidence and choice of one row, whose sums are `at` numbers from the first.
static __device__ __forceinline__ void write_row(const Evidence& p, int64_t row, int64_t at, const double (&exact)[kEach]) {
  const float *prior = static_cast<const float*>(p.prior), *below = static_cast<const float*>(p.below);
  float *sums = static_cast<float*>(p.sums) + at, *logs = static_cast<float*>(p.evidence) + row * p.num_experts;
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
    write_row(p, t, t * p.num_experts, sum);
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
    sum[k] = p.before != nullptr && i < p.num_experts ? static_cast<const float*>(p.before)[b * p.before_stride + i] : 0;
    for (int w = 0; w < (causal ? warp : kWarps); ++w) sum[k] = (causal ? left[w] * sum[k] : sum[k]) + of_warp[w][i];
  }
  if (!causal && warp == 0) write_row(p, b, b * p.sums_stride, sum);
  for (int64_t t = begin; causal && t < end; ++t) {
    const double factor = factor_of(t);
    shares_of(p, b * p.tokens + t, share);
#pragma unroll
    for (int k = 0; k < kEach; ++k) sum[k] = factor * sum[k] + share[k];
    write_row(p, b * p.tokens + t, b * p.sums_stride + t * p.num_experts, sum);
  }
}

void cuda_evidence(DType dtype, const Forward& p, const Evidence& e, const Scratch& scratch, void* stream) {
  const int64_t n = p.n.num_experts;
  for_products(dtype, p, layout_of(p), scratch.q, stream, [&](int64_t t, int64_t tokens, int64_t splits) {
    SMILE_LAUNCH(energies_kernel, blocks(tokens * n, kThreads), kThreads, stream, p.n.rank_of_router, scratch.q, splits,
                 tokens * n, static_cast<float*>(e.energies) + t * n);
  });
  const unsigned grid = e.scope == Scope::token ? blocks(p.n.tokens, kWarps) : unsigned(e.sequences);
  if (grid > 0) SMILE_LAUNCH(evidence_kernel, grid, kThreads, stream, e);
}

}  // namespace smile
