// Interface of the kernels of a SMILE layer: plain pointers, sizes and a stream; no framework types.
//
//     q_i = R_i x;  score_i = |q_i|_2;  I = top-m(score);  w = softmax(score_I);  h_i = vh_i[:r] x
//     y   = x W^T + b + sum_{i in I} w_i (u_i (s_i * h_i) + expert_bias_i)
//
// An entry is a pair (token t, slot j), at index t * m + j of weights, ids and h.
//
// A layer of P parts is P projections of one x with concatenated outputs, each with its own router: an entry is then a
// triple (token, part, slot), at index (t * P + p) * m + j; u and expert_bias hold the rows of all parts for each expert.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SMILE_ON_BOTH __host__ __device__
#else
#define SMILE_ON_BOTH
#endif

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
  int64_t vh_rows;              // rows of an expert in vh, at least r
};

// The parts of a layer, on a CPU only; with one part, count is 1 and the pointers are null.
struct Parts {
  int64_t count;            // P
  const int64_t* features;  // [P] outputs of each
  const int64_t* ranks;     // [P] how many of the r ranks its experts have, the others are not read; 0: no experts
};

// "real" is float, or double where x is double (on a CPU only). On a GPU x has unit x_stride[1].
struct Forward {
  Sizes n;
  Parts parts;
  const void* x;                 // [T, D], element (t, d) at t * x_stride[0] + d * x_stride[1]
  int64_t x_stride[2];
  const void* weight;            // [O, D]; null, as is bias, if y already holds x W^T + b
  const void* bias;              // [O] or null
  const void* vh;                // [P, N, vh_rows, D]
  const void* s;                 // [P, N, r] real
  const void* u;                 // [N, O, r]
  int64_t u_stride;              // elements from one expert's u to the next one's
  const void* expert_bias;       // [N, O] or null
  int64_t expert_bias_stride;    // elements from one expert's bias to the next one's
  const void* router;            // [P, N, g, D]; null: weights and ids are given, not written
  int64_t router_expert_stride;  // elements from one expert's router rows to the next one's
  bool tied_router;              // the router rows are the first rows of vh
  void* energies;                // [T, P, N] real, squared scores, instead of weights and ids; null: not computed. CPU only
  void* weights;                 // [T, P, m] real
  int32_t* ids;                  // [T, P, m]
  void* h;                       // [T, P, m, r] real; null: not stored (never null on a GPU)
  void* y;                       // [T, O] in the dtype of x; null: route only
  int64_t y_stride;              // elements from one token's outputs to the next one's
};

// Gradients; those with a null pointer are not computed. float is double here where x is double (on a CPU only).
struct Backward {
  Sizes n;
  const void* dy;           // [T, O]
  const void* x;            // [T, D], token t at t * x_stride
  int64_t x_stride;
  const void* vh;           // [N, vh_rows, D]
  const float* s;           // [N, r]
  const void* u;            // [N, O, r]
  const void* expert_bias;  // [N, O] or null
  const float* weights;     // [T, m]
  const int32_t* ids;       // [T, m]
  const float* h;           // [T, m, r]
  void* dx;                 // [T, D], holds dy W, to which the experts' part is added
  void* dvh;                // [N, vh_rows, D]
  float* ds;                // [N, r]
  void* du;                 // [N, O, r]
  void* dexpert_bias;       // [N, O]
  float* dweights;          // [T, m]
};

struct RouteBackward {
  Sizes n;
  const float* dweights;  // [T, m]
  const void* x;          // [T, D], token t at t * x_stride
  int64_t x_stride;
  const void* router;     // [N, g, D]
  const float* weights;   // [T, m]
  const int32_t* ids;     // [T, m]
  void* dx;               // [T, D]
  void* drouter;          // [N, g, D]
};

// ---- CPU ----

// Calls body(begin, end, context) on parts of [0, count), each of length grain or more, except for the last.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// Routes if p.router is set; then, if p.y is set, adds the experts to the x W^T + b in it, or, if p.weight is set, computes
// that product too.
void cpu_forward(DType dtype, const Forward& p, ParallelFor parallel_for, int64_t threads);

void cpu_apply_backward(DType dtype, const Backward& p, ParallelFor parallel_for);
void cpu_route_backward(DType dtype, const RouteBackward& p, ParallelFor parallel_for);

// Tokens whose shares are summed for a token: itself, the tokens up to it, its whole sequence, or up to `window` tokens to
// each side (on the CPU only).
enum class Scope { token, causal, sequence, window };

// A share too small for its dtype still counts as evidence, as kLeastShare; an energy of 0 does not.
constexpr double kLeastShare = 1e-30, kMostEnergy = 1e36;

// One step of a routing policy, on B sequences of S tokens, with R = 1 row for each sequence in scope sequence, else S.
struct Evidence {
  int64_t sequences, tokens, num_experts, num_experts_per_tok;
  Scope scope;
  int64_t window;
  bool accumulates;
  void* energies;             // [B, S, N] real, overwritten by the shares
  const bool* real;           // [B, S], false on padding; null: all true
  const float* factors;       // [B, S], element (b, t) at b * factor_strides[0] + t * factor_strides[1]: the decay of
  int64_t factor_strides[2];  // the sum before a token (causal), or the weight of its share (sequence); null: 1
  const void* before;         // [B, N] real, the causal sums of earlier tokens; null: 0
  int64_t before_stride, sums_stride;  // from one sequence to the next in `before` and `sums`
  const void* prior;          // [N] real, log Pbar; null: 0
  const void* below;          // [B, R, N] real, the evidence of the previous layers; null: 0
  void* sums;                 // [B, R, N] real
  void* evidence;             // [B, R, N] real
  void* weights;              // [B, R, m] real
  int32_t* ids;               // [B, R, m]
};
void cpu_evidence(bool is_double, const Evidence& p, ParallelFor parallel_for);

// Whether these kernels compute the base product faster than PyTorch; with more tokens they may not have any.
bool cpu_computes_base(DType dtype, const Sizes& n);

// ---- CUDA: float32, bfloat16, float16; every launcher only enqueues on the stream (a cudaStream_t) ----

constexpr int kMostExperts = 256;

// The entries sorted by expert.
struct Groups {
  int32_t* entries;  // [T * m], in order within an expert, then -1 for each entry with no expert
  int32_t* offsets;  // [N + 1], expert i's are entries[offsets[i] : offsets[i + 1]]
  int32_t* tiles;    // [tile_count(n), 3], expert, begin and end of up to kTileEntries entries; expert -1: none
};
constexpr int64_t kTileEntries = 64;
inline int64_t tile_count(const Sizes& n) {
  const int64_t entries = n.tokens * n.num_experts_per_tok, most = entries / kTileEntries + n.num_experts;
  return entries < most ? entries : most;
}

// Ranks with those that make rows of coefficients multiples of 16 bytes.
SMILE_ON_BOTH inline int64_t padded(int64_t rank) { return (rank + 7) / 8 * 8; }

// Scratch space of a forward call; its contents do not matter.
struct Scratch {
  float* q;  // [q_size(p)], products with the router's rows, and with those of all experts where that is faster
  void* z;   // [T * m, padded(r)] in the type of x, w (s * h); null, as are the groups, without y
  Groups groups;
};
int64_t q_size(const Forward& p);

// Routes if p.router is set; then, if p.y is set, writes p.h and adds the experts to the x W^T + b in p.y, or, if p.weight
// is set, computes that product too.
void cuda_forward(DType dtype, const Forward& p, const Scratch& scratch, void* stream);

// Step e of a routing policy, for the router rows and x of p.
void cuda_evidence(DType dtype, const Forward& p, const Evidence& e, const Scratch& scratch, void* stream);

// A call of few tokens reads W, and takes as long: two launches, and, for yet fewer tokens, the base product within them.
constexpr int64_t kMostFewSlots = 32;
inline bool is_few(const Sizes& n) { return n.tokens <= 64 && n.num_experts_per_tok <= kMostFewSlots; }
inline bool is_small(const Sizes& n) { return n.tokens <= 16 && is_few(n); }

// Scratch space of a backward call: values [T, m, rank] float, coefficients twice [T * m, padded(rank)] in the type of x.
struct BackwardScratch {
  float* values;
  void *coefficients, *more_coefficients;
  Groups groups;
};
void cuda_apply_backward(DType dtype, const Backward& p, const BackwardScratch& scratch, void* stream);
void cuda_route_backward(DType dtype, const RouteBackward& p, const BackwardScratch& scratch, void* stream);

}  // namespace smile
