// One SMILE layer as its kernels see it: plain pointers, sizes and a stream; no framework types.
//
//     q_i = R_i x;  score_i = |q_i|_2;  I = top-m(score);  w = softmax(score_I)
//     y   = x W^T + b + sum_{i in I} w_i (u_i (s_i * (vh_i[:r] x)) + expert_bias_i)
//
// The launchers add the sum to a y that already holds x W^T + b, unless they say otherwise.
#pragma once

#include <cstdint>

namespace smile {

enum class DType { float32, bfloat16, float16, float64 };

struct Sizes {
  int64_t tokens;               // T
  int64_t in_features;          // D
  int64_t out_features;         // O
  int64_t num_experts;          // N
  int64_t num_experts_per_tok;  // m
  int64_t rank_of_expert;       // r
  int64_t rank_of_router;       // g
  int64_t vh_rows;              // k = max(r, g) rows of vh an expert
};

// "real" is float, or double where x is double.
struct Forward {
  Sizes n;
  const void* x;                  // [T, D], element (t, d) at t * x_stride[0] + d * x_stride[1]
  int64_t x_stride[2];
  const void* vh;                 // [N, k, D]
  const void* s;                  // [N, r] real
  const void* u;                  // [N, O, r]
  const void* expert_bias;        // [N, O] or null
  const void* router;             // [N, g, D]; null: weights and ids are given, not written
  int64_t router_expert_stride;   // elements from one expert's router rows to the next one's
  bool tied_router;               // the router rows are the first rows of vh
  void* weights;                  // [T, m] real
  int32_t* ids;                   // [T, m]
  void* h;                        // [T, m, r] real, the selected vh_i[:r] x; null: not wanted
  void* y;                        // [T, O] in the dtype of x; null: route only
};

// Calls body(begin, end, context) on parts of [0, count), none shorter than grain but the last.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// Routes where p.router is set, then adds the experts to y where p.y is set.
void cpu_forward(DType dtype, const Forward& p, ParallelFor parallel_for);

}  // namespace smile
