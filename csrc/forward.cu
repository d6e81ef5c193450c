// Forward on a GPU. Many tokens: products with the router's and all experts' rows; the choice, h and z = w (s * h); entries
// grouped by expert; expand and add to the base product of cuBLAS. Where all rows would be too many, h is formed after the
// choice. Few tokens: decode.cu.
#include "products.cuh"

namespace smile {

template <class T> static void shrink(DType dtype, const Forward& p, const Scratch& scratch, void* stream) {
  const Sizes& n = p.n;
  Projection rows{};
  rows.x = p.x;
  rows.x_stride = p.x_stride[0];
  rows.depth = n.in_features;
  rows.x_aligned = aligned<T>(p.x, p.x_stride[0]);
  rows.first = p.vh;
  rows.columns = n.rank_of_expert;
  rows.first_stride = n.vh_rows * n.in_features;
  rows.factor_aligned = aligned<T>(p.vh, n.in_features);
  rows.out = static_cast<float*>(p.h);
  rows.scaled = scratch.z;
  rows.weights = static_cast<const float*>(p.weights);
  rows.s = static_cast<const float*>(p.s);
  project_groups(dtype, false, rows, n, scratch.groups, stream);
}

template <class T> static void add_experts(const Forward& p, const Scratch& scratch, const int32_t* order, void* stream) {
  const Sizes& n = p.n;
  Expansion expansion{};
  expansion.values = scratch.z;
  expansion.rank = n.rank_of_expert;
  expansion.factor = p.u;
  expansion.columns = n.out_features;
  expansion.expert_stride = p.u_stride;
  expansion.factor_aligned = aligned<T>(p.u, n.rank_of_expert) && aligned<T>(p.u, p.u_stride);
  expansion.bias = p.expert_bias;
  expansion.bias_stride = p.expert_bias_stride;
  expansion.weights = static_cast<const float*>(p.weights);
  expansion.out = p.y;
  expansion.out_stride = p.y_stride;
  expansion.out_aligned = aligned<T>(p.y, p.y_stride);
  expansion.adds = true;
  expansion.ids = p.ids;
  expansion.order = order;
  expansion.tokens = n.tokens;
  expansion.num_experts = n.num_experts;
  expansion.num_experts_per_tok = n.num_experts_per_tok;
  expand<T, false>(expansion, stream);
}

void cuda_forward(DType dtype, const Forward& p, const Scratch& scratch, void* stream) {
  if (p.y == nullptr) return route(dtype, p, scratch, stream);
  if (is_few(p.n)) return few_forward(dtype, p, scratch, stream);
  // Tokens of one expert together have fewer experts in a tile.
  const bool has_h = layout_of(p).with_experts, orders = p.n.num_experts_per_tok == 1 && p.n.tokens > kTileEntries;
  if (p.router != nullptr) route(dtype, p, scratch, stream);
  if (!has_h || orders) group(p.n, p.ids, scratch.groups, stream);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (!has_h) shrink<T>(dtype, p, scratch, stream);
    add_experts<T>(p, scratch, orders ? scratch.groups.entries : nullptr, stream);
  });
}

}  // namespace smile
