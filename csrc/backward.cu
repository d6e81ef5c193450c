// Backward on a GPU: the experts' and the router's gradients. Every sum is formed in a fixed order.
#include "products.cuh"

namespace smile {

// ---- sums over the entries of an expert ----

// out[i, c] = sum over expert i's entries e of w_e term(e, c), in double, since it is one chain of additions; 8 rows of threads
// take every eighth entry.
template <class Out, class Term>
__global__ void __launch_bounds__(256) sum_entries_kernel(Term term, const float* weights, const int32_t* entries,
                                                          const int32_t* offsets, int64_t columns, Out* out) {
  SMILE_SHARED(double, parts, [8][32]);
  const int i = blockIdx.y, row = threadIdx.x / 32, end = offsets[i + 1];
  const int64_t c = blockIdx.x * int64_t(32) + threadIdx.x % 32;
  double sum = 0;
  for (int place = offsets[i] + row; c < columns && place < end; place += 8) {
    const int64_t e = entries[place];
    sum += double(weights[e]) * term(e, c);
  }
  parts[row][threadIdx.x % 32] = sum;
  __syncthreads();
  if (row > 0 || c >= columns) return;
  for (int k = 1; k < 8; ++k) sum += parts[k][threadIdx.x];
  out[i * columns + c] = from_float<Out>(float(sum));
}

template <class Out, class Term>
static void sum_entries(const Sizes& n, const Term& term, const float* weights, const Groups& groups, int64_t columns,
                        Out* out, void* stream) {
  const dim3 grid(blocks(columns, 32), unsigned(n.num_experts));
  SMILE_LAUNCH((sum_entries_kernel<Out, Term>), grid, 256, stream, term, weights, groups.entries, groups.offsets, columns, out);
}

// ds_i = sum w a h
struct SingularValueTerm {
  const float *a, *h;  // [T, m, r]
  int64_t rank;
  __device__ __forceinline__ float operator()(int64_t e, int64_t k) const { return a[e * rank + k] * h[e * rank + k]; }
};

// dexpert_bias_i = sum w dy
template <class T> struct BiasTerm {
  const T* dy;  // [T, O]
  int64_t columns, num_experts_per_tok;
  __device__ __forceinline__ float operator()(int64_t e, int64_t c) const {
    return to_float(dy[e / num_experts_per_tok * columns + c]);
  }
};

// ---- the experts ----

// dweights_e = a_e . (s_i * h_e) + dy_t . expert_bias_i, zero for no expert; one warp per entry.
template <class T> __global__ void __launch_bounds__(kThreads) dweights_kernel(Backward p, const float* a) {
  const Sizes& n = p.n;
  const int lane = threadIdx.x % 32;
  const int64_t e = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32, r = n.rank_of_expert, o = n.out_features;
  if (e >= n.tokens * n.num_experts_per_tok) return;
  const int64_t i = p.ids[e], t = e / n.num_experts_per_tok;
  const bool there = is_expert(p.ids[e], n.num_experts);
  float sum = 0;
  for (int64_t k = lane; there && k < r; k += 32) sum += a[e * r + k] * p.s[i * r + k] * p.h[e * r + k];
  if (p.expert_bias != nullptr)
    for (int64_t c = lane; there && c < o; c += 32)
      sum += to_float(static_cast<const T*>(p.dy)[t * o + c]) * to_float(static_cast<const T*>(p.expert_bias)[i * o + c]);
  sum = warp_sum(sum);
  if (lane == 0) p.dweights[e] = sum;
}

// z_e = w_e (s_i * h_e) in the type of x; one warp per entry.
template <class T> __global__ void __launch_bounds__(kThreads) scale_kernel(Backward p, T* z) {
  const Sizes& n = p.n;
  const int64_t e = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32, r = n.rank_of_expert;
  if (e >= n.tokens * n.num_experts_per_tok || !is_expert(p.ids[e], n.num_experts)) return;
  for (int64_t k = threadIdx.x % 32; k < padded(r); k += 32)
    z[e * padded(r) + k] = from_float<T>(k < r ? p.weights[e] * p.s[p.ids[e] * r + k] * p.h[e * r + k] : 0.0f);
}

template <class T> static void apply_backward(DType dtype, const Backward& p, const BackwardScratch& scratch, void* stream) {
  const Sizes& n = p.n;
  const Groups& groups = scratch.groups;
  const int64_t m = n.num_experts_per_tok, r = n.rank_of_expert, vh_stride = n.vh_rows * n.in_features;
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
  // With a_e = u_i^T dy_t: dh = w (s * a) is the gradient of h, and z = w (s * h) is the factor of dy in du.
  const float* a = scratch.values;
  void *dh = scratch.coefficients, *z = scratch.more_coefficients;

  group(n, p.ids, groups, stream);
  if (p.dx != nullptr || p.dvh != nullptr || p.ds != nullptr || p.dweights != nullptr) {
    Projection projection{};
    projection.x = dy;
    projection.x_stride = projection.depth = n.out_features;
    projection.x_aligned = aligned<T>(dy, n.out_features);
    projection.first = p.u;
    projection.columns = r;
    projection.first_stride = n.out_features * r;
    projection.factor_aligned = aligned<T>(p.u, r);
    projection.out = scratch.values;
    projection.scaled = dh;
    projection.weights = p.weights;
    projection.s = p.s;
    project_groups(dtype, true, projection, n, groups, stream);
  }
  if (p.dx != nullptr) {
    Expansion expansion{};
    expansion.values = dh;
    expansion.rank = r;
    expansion.factor = p.vh;
    expansion.columns = n.in_features;
    expansion.expert_stride = vh_stride;
    expansion.factor_aligned = aligned<T>(p.vh, n.in_features);
    expansion.out = p.dx;
    expansion.out_stride = n.in_features;
    expansion.out_aligned = aligned<T>(p.dx, n.in_features);
    expansion.adds = true;
    expansion.ids = p.ids;
    expansion.order = m == 1 ? groups.entries : nullptr;
    expansion.tokens = n.tokens;
    expansion.num_experts = n.num_experts;
    expansion.num_experts_per_tok = m;
    expand<T, true>(expansion, stream);
  }
  Accumulation gradient{};
  gradient.entries = groups.entries;
  gradient.offsets = groups.offsets;
  gradient.rank = r;
  gradient.num_experts_per_tok = m;
  if (p.dvh != nullptr) {
    gradient.values = dh;
    gradient.x = x;
    gradient.x_stride = p.x_stride;
    gradient.width = n.in_features;
    gradient.x_aligned = aligned<T>(x, p.x_stride);
    gradient.out = p.dvh;
    gradient.out_rank = n.vh_rows;
    gradient.expert_stride = vh_stride;
    gradient.rank_stride = n.in_features;
    gradient.width_stride = 1;
    accumulate<T>(gradient, n.num_experts, stream);
  }
  if (p.du != nullptr) {
    SMILE_LAUNCH(scale_kernel<T>, blocks(n.tokens * m, kWarps), kThreads, stream, p, static_cast<T*>(z));
    gradient.values = z;
    gradient.x = dy;
    gradient.x_stride = gradient.width = n.out_features;
    gradient.x_aligned = aligned<T>(dy, n.out_features);
    gradient.out = p.du;
    gradient.out_rank = r;
    gradient.expert_stride = n.out_features * r;
    gradient.rank_stride = 1;
    gradient.width_stride = r;
    accumulate<T>(gradient, n.num_experts, stream);
  }
  if (p.ds != nullptr) sum_entries(n, SingularValueTerm{a, p.h, r}, p.weights, groups, r, p.ds, stream);
  if (p.dexpert_bias != nullptr)
    sum_entries(n, BiasTerm<T>{dy, n.out_features, m}, p.weights, groups, n.out_features, static_cast<T*>(p.dexpert_bias), stream);
  if (p.dweights != nullptr)
    SMILE_LAUNCH(dweights_kernel<T>, blocks(n.tokens * m, kWarps), kThreads, stream, p, a);
}

void cuda_apply_backward(DType dtype, const Backward& p, const BackwardScratch& scratch, void* stream) {
  with_type(dtype, [&](auto type) { apply_backward<decltype(type)>(dtype, p, scratch, stream); });
}

// ---- the router ----

// dq_e = w_e (dw_e - sum_j w_j dw_j) q_e / |q_e| [g], zero where |q_e| is zero; one warp per entry.
template <class T>
__global__ void __launch_bounds__(kThreads) dq_kernel(RouteBackward p, const float* q, T* dq) {
  const int lane = threadIdx.x % 32;
  const int64_t e = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32, m = p.n.num_experts_per_tok, g = p.n.rank_of_router;
  if (e >= p.n.tokens * m) return;
  float mean = 0;
  for (int64_t other = e / m * m + lane; other < (e / m + 1) * m; other += 32) mean += p.weights[other] * p.dweights[other];
  const float size = norm(q + e * g, g), dscore = p.weights[e] * (p.dweights[e] - warp_sum(mean));
  for (int64_t k = lane; k < padded(g); k += 32)
    dq[e * padded(g) + k] = from_float<T>(k < g && size > 0 ? dscore * (q[e * g + k] / size) : 0.0f);
}

template <class T> static void route_backward(DType dtype, const RouteBackward& p, const BackwardScratch& scratch, void* stream) {
  const Sizes& n = p.n;
  const Groups& groups = scratch.groups;
  const int64_t m = n.num_experts_per_tok, g = n.rank_of_router, d = n.in_features;
  const bool router_aligned = aligned<T>(p.router, d);
  group(n, p.ids, groups, stream);
  Projection projection{};
  projection.x = p.x;
  projection.x_stride = p.x_stride;
  projection.depth = d;
  projection.x_aligned = aligned<T>(p.x, p.x_stride);
  projection.first = p.router;
  projection.columns = g;
  projection.first_stride = g * d;
  projection.factor_aligned = router_aligned;
  projection.out = scratch.values;
  project_groups(dtype, false, projection, n, groups, stream);
  T* dq = static_cast<T*>(scratch.coefficients);
  SMILE_LAUNCH(dq_kernel<T>, blocks(n.tokens * m, kWarps), kThreads, stream, p, scratch.values, dq);
  if (p.dx != nullptr) {
    Expansion expansion{};
    expansion.values = dq;
    expansion.rank = g;
    expansion.factor = p.router;
    expansion.columns = d;
    expansion.expert_stride = g * d;
    expansion.factor_aligned = router_aligned;
    expansion.out = p.dx;
    expansion.out_stride = d;
    expansion.out_aligned = aligned<T>(p.dx, d);
    expansion.ids = p.ids;
    expansion.tokens = n.tokens;
    expansion.num_experts = n.num_experts;
    expansion.num_experts_per_tok = m;
    expand<T, true>(expansion, stream);
  }
  if (p.drouter != nullptr) {
    Accumulation gradient{};
    gradient.values = dq;
    gradient.rank = g;
    gradient.x = p.x;
    gradient.x_stride = p.x_stride;
    gradient.width = d;
    gradient.x_aligned = projection.x_aligned;
    gradient.out = p.drouter;
    gradient.out_rank = g;
    gradient.expert_stride = g * d;
    gradient.rank_stride = d;
    gradient.width_stride = 1;
    gradient.entries = groups.entries;
    gradient.offsets = groups.offsets;
    gradient.num_experts_per_tok = m;
    accumulate<T>(gradient, n.num_experts, stream);
  }
}

void cuda_route_backward(DType dtype, const RouteBackward& p, const BackwardScratch& scratch, void* stream) {
  with_type(dtype, [&](auto type) { route_backward<decltype(type)>(dtype, p, scratch, stream); });
}

}  // namespace smile
