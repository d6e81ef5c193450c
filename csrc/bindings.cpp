// torch.ops.smile_kernels_ext: the operators registered with PyTorch, in its stable ABI (2.10 and later). Shapes are checked
// here; smile.h documents them. Built without SMILE_CUDA this is the CPU library, which also defines the schemas; the CUDA
// library adds its kernels to them, so it is loaded second.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>  // STD_CUDA_KERNEL_LAUNCH_CHECK, which the other headers of 2.11 do not include
#endif
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "smile.h"

#if defined(SMILE_CUDA) && !defined(SMILE_EMULATION)
#include <cuda_runtime_api.h>
#define SMILE_DEVICE CUDA
#else
#define SMILE_DEVICE CPU
#endif

#if defined(SMILE_EMULATION)
extern "C" void emulated_finish();
#endif

namespace {

// The tests give the namespace another name by a macro, which the macros of PyTorch 2.10 do not expand.
#define SMILE_EXPANDED(macro, ...) macro(__VA_ARGS__)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// None instead of an empty list: a program exported by PyTorch passes defaults, and cannot pass an empty list.
using MaybeIntegers = std::optional<std::vector<int64_t>>;

smile::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return smile::DType::float32;
    case ScalarType::BFloat16: return smile::DType::bfloat16;
    case ScalarType::Half: return smile::DType::float16;
    case ScalarType::Double: return smile::DType::float64;
    default: STD_TORCH_CHECK(false, "x: expected float32, bfloat16, float16 or float64");
  }
}

ScalarType real_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int32_t device_type(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

struct Shape {
  int64_t dim = 0, size[8] = {};
  Shape(std::initializer_list<int64_t> sizes) {
    for (int64_t each : sizes) size[dim++] = each;
  }
  Shape then(std::initializer_list<int64_t> more) const {
    Shape whole = *this;
    for (int64_t each : more) whole.size[whole.dim++] = each;
    return whole;
  }
};

// Checks shape, dtype and device of a tensor against x.
void check(const char* name, const Tensor& t, const Tensor& x, ScalarType dtype, Shape shape) {
  bool fits = t.dim() == shape.dim;
  for (int64_t d = 0; d < shape.dim; ++d) fits = fits && t.size(d) == shape.size[d];
  STD_TORCH_CHECK(device_type(t) == device_type(x) && t.get_device_index() == x.get_device_index(), name,
                  ": is on another device than x");
  if (fits && t.scalar_type() == dtype) return;
  std::string expected, got;
  for (int64_t d = 0; d < shape.dim; ++d) expected += (d ? ", " : "") + std::to_string(shape.size[d]);
  for (int64_t d = 0; d < t.dim(); ++d) got += (d ? ", " : "") + std::to_string(t.size(d));
  STD_TORCH_CHECK(fits, name, ": has shape [", got, "]; expected [", expected, "]");
  STD_TORCH_CHECK(false, name, ": has another dtype than expected for this x");
}

// A contiguous tensor on the device of `like`; the shim's allocation costs a tenth of a call of aten::new_empty.
Tensor empty(const Tensor& like, ScalarType dtype, Shape shape) {
  int64_t strides[8], stride = 1;
  for (int64_t d = shape.dim; d-- > 0; stride *= shape.size[d]) strides[d] = stride;
  const auto raw_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dim, shape.size, strides, raw_dtype, device_type(like),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor dispatch(const char* name, std::initializer_list<StableIValue> arguments) {
  std::vector<StableIValue> stack(arguments);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// at::linear, with the same bits as nn.Linear.
Tensor base_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  return dispatch("aten::linear", {from(x), from(weight), from(bias)});
}

Tensor with_whole_rows(const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

#if defined(SMILE_CUDA)
// On a GPU the kernels of a small batch compute all of y, and read h to expand it.
constexpr bool kAlwaysNeedsH = true;
bool computes_base_product(const smile::Sizes& n, const Tensor&) { return smile::is_small(n); }

Tensor kernel_input(const Tensor& x) { return with_whole_rows(x); }

// Where to launch: the caller's current stream on the device of x, which is the current device during the call.
struct Launch {
#if defined(SMILE_EMULATION)
  void* stream = nullptr;
  explicit Launch(const Tensor&) {}
  void check() const { emulated_finish(); }
#else
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  explicit Launch(const Tensor& x) : guard(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
  void check() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
#endif
};

// Arrays in one allocation: `place` reserves one and writes its address to `to` when the memory is allocated.
class Memory {
 public:
  template <class P> void place(P** to, int64_t bytes) {
    places.push_back({reinterpret_cast<void**>(to), size});
    size += (bytes + 255) / 256 * 256;
  }
  void place(smile::Groups& groups, const smile::Sizes& n) {
    place(&groups.entries, n.tokens * n.num_experts_per_tok * sizeof(int32_t));
    place(&groups.offsets, (n.num_experts + 1) * sizeof(int32_t));
    place(&groups.tiles, 3 * smile::tile_count(n) * sizeof(int32_t));
  }
  void allocate(const Tensor& like) {
    memory = empty(like, ScalarType::Byte, {size});
    for (const auto& [to, at] : places) *to = static_cast<char*>(memory->mutable_data_ptr()) + at;
  }

 private:
  std::vector<std::pair<void**, int64_t>> places;
  int64_t size = 0;
  std::optional<Tensor> memory;
};

int64_t bytes_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

void check_device_limits(const Tensor& x, const smile::Sizes& n) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "x: is float64; the CUDA kernels take float32, bfloat16, float16");
  STD_TORCH_CHECK(n.num_experts <= smile::kMostExperts, "num_local_experts: is ", n.num_experts,
                  "; the CUDA kernels take at most ", smile::kMostExperts);
}

void run(const Tensor& x, const smile::Forward& p) {
  check_device_limits(x, p.n);
  STD_TORCH_CHECK(p.parts.count == 1, "parts: has ", p.parts.count, "; the CUDA kernels take one part at a time");
  if (p.n.tokens == 0) return;
  const Launch launch(x);
  Memory memory;
  smile::Scratch scratch{};
  if (p.router != nullptr) memory.place(&scratch.q, smile::q_size(p) * sizeof(float));
  if (p.y != nullptr) {
    memory.place(&scratch.z, p.n.tokens * p.n.num_experts_per_tok * smile::padded(p.n.rank_of_expert) * bytes_of(x));
    memory.place(scratch.groups, p.n);
  }
  memory.allocate(x);
  smile::cuda_forward(dtype_of(x), p, scratch, launch.stream);
  launch.check();
}

// Scratch of a backward call, whose coefficients have `rank` numbers.
template <class F> void with_backward_scratch(const Tensor& x, const smile::Sizes& n, int64_t rank, const F& launch_on) {
  const Launch launch(x);
  Memory memory;
  smile::BackwardScratch scratch;
  const int64_t entries = n.tokens * n.num_experts_per_tok, coefficients = entries * smile::padded(rank) * bytes_of(x);
  memory.place(&scratch.values, entries * rank * sizeof(float));
  memory.place(&scratch.coefficients, coefficients);
  memory.place(&scratch.more_coefficients, coefficients);
  memory.place(scratch.groups, n);
  memory.allocate(x);
  launch_on(scratch, launch.stream);
  launch.check();
}

void run_backward(const Tensor& x, const smile::Backward& p) {
  with_backward_scratch(x, p.n, p.n.rank_of_expert, [&](const smile::BackwardScratch& scratch, void* stream) {
    smile::cuda_apply_backward(dtype_of(x), p, scratch, stream);
  });
}

void run_backward(const Tensor& x, const smile::RouteBackward& p) {
  with_backward_scratch(x, p.n, p.n.rank_of_router, [&](const smile::BackwardScratch& scratch, void* stream) {
    smile::cuda_route_backward(dtype_of(x), p, scratch, stream);
  });
}
#else
constexpr bool kAlwaysNeedsH = false;
bool computes_base_product(const smile::Sizes& n, const Tensor& weight) {
  return smile::cpu_computes_base(dtype_of(weight), n) && weight.is_contiguous();  // at::linear takes any without a copy
}

Tensor kernel_input(const Tensor& x) { return x; }

struct Launch {
  explicit Launch(const Tensor&) {}
};

void check_device_limits(const Tensor&, const smile::Sizes&) {}

void check_ids(const smile::Sizes& n, const int32_t* ids, int64_t parts = 1) {
  for (int64_t e = 0; e < n.tokens * parts * n.num_experts_per_tok; ++e)
    STD_TORCH_CHECK(ids[e] >= -1 && ids[e] < n.num_experts, "ids: contains ", ids[e], "; expected 0 to ", n.num_experts - 1,
                    ", or -1 for no expert");
}

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

void run(const Tensor& x, const smile::Forward& p) {
  if (p.router == nullptr) check_ids(p.n, p.ids, p.parts.count);
  smile::cpu_forward(dtype_of(x), p, parallel_for, torch::stable::get_num_threads());
}

void run_backward(const Tensor& x, const smile::Backward& p) {
  check_ids(p.n, p.ids);
  smile::cpu_apply_backward(dtype_of(x), p, parallel_for);
}

void run_backward(const Tensor& x, const smile::RouteBackward& p) {
  check_ids(p.n, p.ids);
  smile::cpu_route_backward(dtype_of(x), p, parallel_for);
}
#endif

// The tensors of one forward call, checked, in the layout of the kernels. It owns the copies.
struct Call {
  Tensor x;
  smile::Forward p{};
  std::vector<Tensor> owned;
  std::optional<Tensor> weights, ids, h, y;

  std::vector<int64_t> parts, ranks;
  Shape rows{};  // the leading dimensions of x [..., D], whose product is T

  Call(const Tensor& x_, const MaybeIntegers& parts_, const MaybeIntegers& ranks_)
      : x(x_), parts(parts_.value_or(std::vector<int64_t>{})), ranks(ranks_.value_or(std::vector<int64_t>{})) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= 5, "x: has ", x.dim(), " dimensions; expected 1 to 5, [..., in_features]");
    p.parts = {parts.empty() ? 1 : int64_t(parts.size()), parts.empty() ? nullptr : parts.data(), ranks.empty() ? nullptr : ranks.data()};
    STD_TORCH_CHECK(ranks.empty() || ranks.size() == parts.size(), "rank_of_parts: has ", ranks.size(), " numbers; expected ",
                    parts.size(), ", one for each part");
    const bool is_matrix = x.dim() == 2;
    x = is_matrix ? kernel_input(x) : packed(x);
    p.n.tokens = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) p.n.tokens *= rows.size[rows.dim++] = x.size(d);
    p.n.in_features = x.size(rows.dim);
    STD_TORCH_CHECK(p.n.in_features >= 1, "x: has 0 features; expected 1 or more");
    p.x = x.const_data_ptr();
    p.x_stride[0] = is_matrix ? x.stride(0) : p.n.in_features;
    p.x_stride[1] = is_matrix ? x.stride(1) : 1;
  }

  // [P, size, ...] if the layer has parts, else [size, ...].
  Shape of_parts(std::initializer_list<int64_t> sizes) const {
    return (parts.empty() ? Shape{} : Shape{p.parts.count}).then(sizes);
  }

  // [..., P, size, ...]: of each row of x, and of each part if the layer has parts.
  Shape of_rows(std::initializer_list<int64_t> sizes) const {
    return (parts.empty() ? rows : rows.then({p.parts.count})).then(sizes);
  }

  const void* keep(const Tensor& t) {
    owned.push_back(packed(t));
    return owned.back().const_data_ptr();
  }

  // The first of the dimensions that a tensor has without parts.
  int64_t first() const { return parts.empty() ? 0 : 1; }

  // Routing by the first `rank` rows of each expert in `router`, which may be a view of vh with any expert stride.
  void set_router(const char* name, const Tensor& router, int64_t rank, int64_t num_experts_per_tok) {
    const int64_t at = first();
    STD_TORCH_CHECK(router.dim() == at + 3 && rank >= 1 && rank <= router.size(at + 1), name, ": has ", router.dim(),
                    " dimensions; expected [N, rows, in_features] with at least ", rank, " rows");
    STD_TORCH_CHECK(rank <= p.n.in_features, "rank_of_router: is ", rank, "; expected 1 to ", p.n.in_features,
                    ", in_features");
    const int64_t experts = router.size(at), rows_of_expert = router.size(at + 1);
    check(name, router, x, x.scalar_type(), of_parts({experts, rows_of_expert, p.n.in_features}));
    p.n.num_experts = experts;
    p.n.rank_of_router = rank;
    p.n.num_experts_per_tok = num_experts_per_tok;
    STD_TORCH_CHECK(num_experts_per_tok >= 1 && num_experts_per_tok <= p.n.num_experts,
                    "num_experts_per_tok: is ", num_experts_per_tok, "; expected 1 to ", p.n.num_experts);
    const bool evenly = router.stride(at + 2) == 1 && router.stride(at + 1) == p.n.in_features &&
                        (at == 0 || router.stride(0) == experts * router.stride(1));
    p.router = evenly ? router.const_data_ptr() : keep(router);
    p.router_expert_stride = evenly ? router.stride(at) : rows_of_expert * p.n.in_features;
  }

  // Where the router's choice is written.
  void set_choice() {
    const int64_t num_experts_per_tok = p.n.num_experts_per_tok;
    weights = empty(x, real_of(x), of_rows({num_experts_per_tok}));
    ids = empty(x, ScalarType::Int, of_rows({num_experts_per_tok}));
    p.weights = weights->mutable_data_ptr();
    p.ids = static_cast<int32_t*>(ids->mutable_data_ptr());
  }

  void set_routing(const Tensor& weights_, const Tensor& ids_) {
    p.n.num_experts_per_tok = ids_.dim() > 0 ? ids_.size(ids_.dim() - 1) : 0;
    const Shape expected = of_rows({p.n.num_experts_per_tok});
    check("ids", ids_, x, ScalarType::Int, expected);
    check("weights", weights_, x, real_of(x), expected);
    p.weights = const_cast<void*>(keep(weights_));
    p.ids = static_cast<int32_t*>(const_cast<void*>(keep(ids_)));
  }

  // The experts. u and expert_bias may be slices of larger tensors, with any expert stride.
  void set_experts(const Tensor& vh, const Tensor& s, const Tensor& u, const std::optional<Tensor>& expert_bias, bool save) {
    const int64_t at = first();
    STD_TORCH_CHECK(vh.dim() == at + 3 && s.dim() == at + 2 && u.dim() == 3,
                    "vh, s, u: expected [N, rows, in_features], [N, r], [N, out_features, r]");
    const auto dtype = x.scalar_type();
    const int64_t experts = s.size(at), out_features = p.n.out_features = u.size(1);
    STD_TORCH_CHECK(experts >= 1 && out_features >= 1, "u: has ", experts, " experts and ", out_features,
                    " outputs; expected 1 or more");
    STD_TORCH_CHECK(p.router == nullptr || p.n.num_experts == experts, "router: has ", p.n.num_experts,
                    " experts; expected those of s, ", experts);
    p.n.num_experts = experts;
    const int64_t rank = p.n.rank_of_expert = s.size(at + 1);
    p.n.vh_rows = vh.size(at + 1);
    STD_TORCH_CHECK(p.n.vh_rows >= rank, "vh: has ", p.n.vh_rows, " rows; expected at least ", rank);
    check("vh", vh, x, dtype, of_parts({experts, p.n.vh_rows, p.n.in_features}));
    check("s", s, x, real_of(x), of_parts({experts, rank}));
    check("u", u, x, dtype, {experts, out_features, rank});
    if (expert_bias) check("expert_bias", *expert_bias, x, dtype, {experts, out_features});
    int64_t outputs = parts.empty() ? out_features : 0;
    for (int64_t each : parts) {
      STD_TORCH_CHECK(each >= 1 && each <= out_features, "parts: contains ", each, "; expected 1 to ", out_features,
                      ", the outputs of u");
      outputs += each;
    }
    STD_TORCH_CHECK(outputs == out_features, "parts: have ", outputs, " outputs together; expected those of u, ", out_features);
    for (int64_t each : ranks)
      STD_TORCH_CHECK(each >= 0 && each <= rank, "rank_of_parts: contains ", each, "; expected 0 to ", rank);
    p.vh = keep(vh);
    p.s = keep(s);
    const bool u_rows = u.stride(2) == 1 && u.stride(1) == rank;
    p.u = u_rows ? u.const_data_ptr() : keep(u);
    p.u_stride = u_rows ? u.stride(0) : out_features * rank;
    if (expert_bias) {
      const bool bias_rows = expert_bias->stride(1) == 1;
      p.expert_bias = bias_rows ? expert_bias->const_data_ptr() : keep(*expert_bias);
      p.expert_bias_stride = bias_rows ? expert_bias->stride(0) : out_features;
    }
    if (save || kAlwaysNeedsH) {
      h = empty(x, real_of(x), of_rows({p.n.num_experts_per_tok, rank}));
      // No kernel writes h where an id is not an expert, or where a part has fewer ranks.
      if (save && (p.router == nullptr || !ranks.empty())) torch::stable::zero_(*h);
      p.h = h->mutable_data_ptr();
    }
  }

  void set_base(const Tensor& weight, const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [out_features, in_features]");
    check("weight", weight, x, x.scalar_type(), {p.n.out_features, p.n.in_features});
    if (bias) check("bias", *bias, x, x.scalar_type(), {p.n.out_features});
    if (computes_base_product(p.n, weight)) {
      p.weight = keep(weight);
      p.bias = bias ? keep(*bias) : nullptr;
      set_output(empty(x, x.scalar_type(), rows.then({p.n.out_features})));
    } else {
      set_output(base_product(x, weight, bias));
    }
  }

  // The tensor that the experts are added to, in place.
  void set_output(const Tensor& y_) {
    y = y_;
    check("y", *y, x, x.scalar_type(), rows.then({p.n.out_features}));
    const bool is_matrix = y->dim() == 2;
    STD_TORCH_CHECK(is_matrix ? y->stride(1) == 1 : y->is_contiguous(), "y: has outputs at a stride of ",
                    y->stride(y->dim() - 1), "; expected 1, and a contiguous tensor of other than 2 dimensions");
    p.y = y->mutable_data_ptr();
    p.y_stride = is_matrix ? y->stride(0) : p.n.out_features;
  }

  Tensor saved(bool save) const { return save ? *h : empty(x, real_of(x), {0}); }
};

std::tuple<Tensor, Tensor> route(const Tensor& x, const Tensor& router, int64_t num_experts_per_tok) {
  Call call(x, std::nullopt, std::nullopt);
  call.set_router("router", router, router.dim() == 3 ? router.size(1) : 0, num_experts_per_tok);
  call.set_choice();
  run(call.x, call.p);
  return {*call.weights, *call.ids};
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const Tensor& vh, const Tensor& s, const Tensor& u,
                                 const std::optional<Tensor>& expert_bias, const Tensor& weights, const Tensor& ids,
                                 bool save, MaybeIntegers parts, MaybeIntegers rank_of_parts) {
  Call call(x, parts, rank_of_parts);
  call.set_routing(weights, ids);
  call.set_experts(vh, s, u, expert_bias, save);
  call.set_base(weight, bias);
  run(call.x, call.p);
  return {*call.y, call.saved(save)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& vh, const Tensor& s,
    const Tensor& u, const std::optional<Tensor>& expert_bias, const std::optional<Tensor>& router,
    int64_t num_experts_per_tok, int64_t rank_of_router, bool save, MaybeIntegers parts,
    MaybeIntegers rank_of_parts) {
  Call call(x, parts, rank_of_parts);
  call.p.tied_router = !router;
  call.set_router(router ? "router" : "vh", router ? *router : vh, rank_of_router, num_experts_per_tok);
  call.set_choice();
  call.set_experts(vh, s, u, expert_bias, save);
  call.set_base(weight, bias);
  run(call.x, call.p);
  return {*call.y, *call.weights, *call.ids, call.saved(save)};
}

// Adds the experts to y in place, routed by weights and ids if given; returns the weights and ids it chose, and h.
std::tuple<Tensor, Tensor, Tensor> delta_in_place(
    const Tensor& y, const Tensor& x, const Tensor& vh, const Tensor& s, const Tensor& u,
    const std::optional<Tensor>& expert_bias, const std::optional<Tensor>& router, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& ids, int64_t num_experts_per_tok, int64_t rank_of_router, bool save,
    MaybeIntegers parts, MaybeIntegers rank_of_parts) {
  Call call(x, parts, rank_of_parts);
  STD_TORCH_CHECK(weights.has_value() == ids.has_value(), "weights, ids: expected both or none");
  if (ids) {
    call.set_routing(*weights, *ids);
  } else {
    call.p.tied_router = !router;
    call.set_router(router ? "router" : "vh", router ? *router : vh, rank_of_router, num_experts_per_tok);
    call.set_choice();
  }
  call.set_experts(vh, s, u, expert_bias, save);
  call.set_output(y);
  run(call.x, call.p);
  const Tensor none = empty(x, ScalarType::Int, {0});
  return {ids ? empty(x, real_of(x), {0}) : *call.weights, ids ? none : *call.ids, call.saved(save)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta(
    const Tensor& y, const Tensor& x, const Tensor& vh, const Tensor& s, const Tensor& u,
    const std::optional<Tensor>& expert_bias, const std::optional<Tensor>& router, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& ids, int64_t num_experts_per_tok, int64_t rank_of_router, bool save,
    MaybeIntegers parts, MaybeIntegers rank_of_parts) {
  STD_TORCH_CHECK(y.dim() == 2, "y: has ", y.dim(), " dimensions; expected [tokens, out_features]");
  Tensor out = empty(y, y.scalar_type(), {y.size(0), y.size(1)});
  torch::stable::copy_(out, y);
  const auto [chosen, chosen_ids, h] = delta_in_place(out, x, vh, s, u, expert_bias, router, weights, ids, num_experts_per_tok,
                                                      rank_of_router, save, parts, rank_of_parts);
  return {out, chosen, chosen_ids, h};
}

// `given` as doubles or floats, to match x; null if absent.
const void* optional_real(const char* name, const std::optional<Tensor>& given, Call& call, std::initializer_list<int64_t> shape) {
  if (!given) return nullptr;
  check(name, *given, call.x, real_of(call.x), shape);
  return call.keep(*given);
}

// One step of a routing policy for the x and router of a call: its checked arguments, and the tensors it writes.
struct Step {
  smile::Evidence p{};
  int64_t rows;  // for each sequence
  std::optional<Tensor> energies, evidence, weights, ids;

  Step(Call& call, const std::optional<Tensor>& prior, const std::optional<Tensor>& real, const std::optional<Tensor>& factors,
       const std::optional<Tensor>& below, int64_t sequences, int64_t scope, bool accumulates) {
    STD_TORCH_CHECK(sequences >= 1 && call.p.n.tokens % sequences == 0, "sequences: is ", sequences, "; expected a divisor of ",
                    call.p.n.tokens, ", the tokens");
#if defined(SMILE_CUDA)
    STD_TORCH_CHECK(scope >= 0 && scope <= 2, "scope: is ", scope, "; expected 0 (token), 1 (causal) or 2 (sequence)");
#else
    STD_TORCH_CHECK(scope >= 0, "scope: is ", scope, "; expected 0 (token), 1 (causal), 2 (sequence) or 2 + w (a window)");
#endif
    p.sequences = sequences;
    p.tokens = call.p.n.tokens / sequences;
    const int64_t n = p.num_experts = call.p.n.num_experts, m = p.num_experts_per_tok = call.p.n.num_experts_per_tok;
    p.scope = static_cast<smile::Scope>(std::min<int64_t>(scope, 3));
    p.window = std::min(scope - 2, p.tokens);
    p.accumulates = accumulates;
    rows = p.scope == smile::Scope::sequence ? 1 : p.tokens;
    if (real) {
      check("real", *real, call.x, ScalarType::Bool, {sequences, p.tokens});
      p.real = static_cast<const bool*>(call.keep(*real));
    }
    if (factors) {
      const bool fits = factors->dim() == 2 && (factors->size(0) == 1 || factors->size(0) == sequences) &&
                        (factors->size(1) == 1 || factors->size(1) == p.tokens) && factors->scalar_type() == ScalarType::Float;
      STD_TORCH_CHECK(fits, "factors: expected a float32 tensor [1 or ", sequences, ", 1 or ", p.tokens, "]");
      p.factors = static_cast<const float*>(call.keep(*factors));
      p.factor_strides[0] = factors->size(0) == 1 ? 0 : factors->size(1);
      p.factor_strides[1] = factors->size(1) == 1 ? 0 : 1;
    }
    p.prior = optional_real("prior", prior, call, {n});
    p.below = optional_real("below", below, call, {sequences, rows, n});
    const ScalarType type = real_of(call.x);
    energies = empty(call.x, type, {call.p.n.tokens, n});
    evidence = empty(call.x, type, {sequences, rows, n});
    weights = empty(call.x, type, {sequences, rows, m});
    ids = empty(call.x, ScalarType::Int, {sequences, rows, m});
    call.p.energies = p.energies = energies->mutable_data_ptr();
    p.evidence = evidence->mutable_data_ptr();
    p.weights = weights->mutable_data_ptr();
    p.ids = static_cast<int32_t*>(ids->mutable_data_ptr());
  }

  void run_on(const Call& call) const {
#if defined(SMILE_CUDA)
    check_device_limits(call.x, call.p.n);
    const Launch launch(call.x);
    const Tensor q = empty(call.x, ScalarType::Float, {smile::q_size(call.p)});
    smile::cuda_evidence(dtype_of(call.x), call.p, p, {static_cast<float*>(q.mutable_data_ptr()), nullptr, {}}, launch.stream);
    launch.check();
#else
    run(call.x, call.p);
    smile::cpu_evidence(call.x.scalar_type() == ScalarType::Double, p, parallel_for);
#endif
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> evidence(
    const Tensor& x, const Tensor& router, const std::optional<Tensor>& prior, const std::optional<Tensor>& real,
    const std::optional<Tensor>& factors, const std::optional<Tensor>& before, const std::optional<Tensor>& below,
    int64_t num_experts_per_tok, int64_t rank_of_router, int64_t sequences, int64_t scope, bool accumulates) {
  Call call(x, std::nullopt, std::nullopt);
  call.set_router("router", router, rank_of_router, num_experts_per_tok);
  Step step(call, prior, real, factors, below, sequences, scope, accumulates);
  const int64_t n = call.p.n.num_experts;
  step.p.before = optional_real("before", before, call, {sequences, n});
  step.p.before_stride = n;
  const Tensor sums = empty(call.x, real_of(x), {sequences, step.rows, n});
  step.p.sums = sums.mutable_data_ptr();
  step.p.sums_stride = step.rows * n;
  step.run_on(call);
  return {*step.weights, *step.ids, *step.evidence, sums};
}

// The step, then the layer under its choice. Reads the sums before this call at `past` - 1 in `sums`, and writes there from
// `past` on.
std::tuple<Tensor, Tensor, Tensor, Tensor> evidence_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& vh, const Tensor& s,
    const Tensor& u, const std::optional<Tensor>& expert_bias, const std::optional<Tensor>& router,
    const std::optional<Tensor>& prior, const std::optional<Tensor>& real, const std::optional<Tensor>& factors,
    const std::optional<Tensor>& sums, int64_t past, const std::optional<Tensor>& below, int64_t num_experts_per_tok,
    int64_t rank_of_router, int64_t sequences, int64_t scope, bool accumulates) {
  Call call(x, std::nullopt, std::nullopt);
  call.set_router(router ? "router" : "vh", router ? *router : vh, rank_of_router, num_experts_per_tok);
  Step step(call, prior, real, factors, below, sequences, scope, accumulates);
  const int64_t n = call.p.n.num_experts;
  STD_TORCH_CHECK(s.dim() == 2 && s.size(0) == n, "s: expected [", n, ", r], for the experts of the router");
  std::optional<Tensor> own;
  if (sums) {
    STD_TORCH_CHECK(step.p.scope == smile::Scope::causal, "sums: given with scope ", scope, "; expected scope 1 (causal)");
    const int64_t capacity = sums->dim() == 3 ? sums->size(1) : 0;
    check("sums", *sums, call.x, real_of(x), {sequences, capacity, n});
    STD_TORCH_CHECK(sums->is_contiguous(), "sums: expected a contiguous tensor");
    STD_TORCH_CHECK(past >= 0 && past <= capacity - step.p.tokens, "past: is ", past, " before ", step.p.tokens,
                    " tokens; expected space for them in sums, which has ", capacity, " positions");
    const int64_t bytes = n * (real_of(x) == ScalarType::Double ? 8 : 4);
    char* data = static_cast<char*>(sums->mutable_data_ptr());
    step.p.before = past > 0 ? data + (past - 1) * bytes : nullptr;
    step.p.sums = data + past * bytes;
    step.p.before_stride = step.p.sums_stride = capacity * n;
  } else {
    own = empty(call.x, real_of(x), {sequences, step.rows, n});
    step.p.sums = own->mutable_data_ptr();
    step.p.sums_stride = step.rows * n;
  }
  step.run_on(call);

  call.p.router = nullptr;  // from here on the routing is given
  call.p.energies = nullptr;
  if (step.rows == step.p.tokens) {
    call.p.weights = step.p.weights;
    call.p.ids = step.p.ids;
  } else {  // every token has the choice of its sequence
    for (auto [each, choice] : {std::pair(&call.weights, &step.weights), std::pair(&call.ids, &step.ids)}) {
      *each = empty(call.x, (*choice)->scalar_type(), {sequences, step.p.tokens, num_experts_per_tok});
      torch::stable::copy_(**each, **choice);
    }
    call.p.weights = call.weights->mutable_data_ptr();
    call.p.ids = static_cast<int32_t*>(call.ids->mutable_data_ptr());
  }
  call.set_experts(vh, s, u, expert_bias, false);
  call.set_base(weight, bias);
  run(call.x, call.p);
  return {*call.y, *step.weights, *step.ids, *step.evidence};
}

// ---- backward ----

Tensor matrix_product(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  return dispatch("aten::mm", {from(a), from(b)});
}

// A gradient like t, which the kernels write entirely; without tokens nothing is launched, and it is zero.
Tensor gradient(bool wanted, const Tensor& t, int64_t tokens) {
  if (!wanted) return empty(t, t.scalar_type(), {0});
  Tensor result = torch::stable::empty_like(t);
  if (tokens == 0) torch::stable::zero_(result);
  return result;
}

void* address(bool wanted, const Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

// Gradients in the order of the arguments, weights last; bit i of `needs` requests number i, the others are empty. Without
// `weight`, dx contains only the experts' part.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> apply_backward(
    const Tensor& dy_, const Tensor& x_, const std::optional<Tensor>& weight, const Tensor& vh_, const Tensor& s_, const Tensor& u_,
    const std::optional<Tensor>& expert_bias_, const Tensor& weights_, const Tensor& ids_, const Tensor& h_,
    int64_t needs) {
  STD_TORCH_CHECK(x_.dim() == 2 && vh_.dim() == 3 && s_.dim() == 2 && u_.dim() == 3 && ids_.dim() == 2,
                  "x, vh, s, u, ids: expected [T, D], [N, rows, D], [N, r], [N, O, r], [T, m]");
  const Tensor x = with_whole_rows(x_), dy = packed(dy_), vh = packed(vh_), s = packed(s_), u = packed(u_);
  const Tensor weights = packed(weights_), ids = packed(ids_), h = packed(h_);
  const Tensor expert_bias = expert_bias_ ? packed(*expert_bias_) : empty(x, x.scalar_type(), {0});
  bool wants[8];
  for (int i = 0; i < 8; ++i) wants[i] = needs >> i & 1;
  wants[6] = wants[6] && expert_bias_;
  wants[1] = wants[1] && weight;

  smile::Backward p{};
  p.n = {x.size(0), x.size(1), u.size(1), s.size(0), ids.size(1), s.size(1), 0, vh.size(1)};
  STD_TORCH_CHECK(p.n.in_features >= 1 && p.n.out_features >= 1 && p.n.num_experts >= 1, "u: has ", p.n.num_experts,
                  " experts and ", p.n.out_features, " outputs of ", p.n.in_features, " features; expected 1 or more");
  check_device_limits(x, p.n);
  check("dy", dy, x, x.scalar_type(), {p.n.tokens, p.n.out_features});
  if (weight) check("weight", *weight, x, x.scalar_type(), {p.n.out_features, p.n.in_features});
  check("vh", vh, x, x.scalar_type(), {p.n.num_experts, p.n.vh_rows, p.n.in_features});
  check("u", u, x, x.scalar_type(), {p.n.num_experts, p.n.out_features, p.n.rank_of_expert});
  check("s", s, x, real_of(x), {p.n.num_experts, p.n.rank_of_expert});
  if (expert_bias_) check("expert_bias", expert_bias, x, x.scalar_type(), {p.n.num_experts, p.n.out_features});
  check("weights", weights, x, real_of(x), {p.n.tokens, p.n.num_experts_per_tok});
  check("ids", ids, x, ScalarType::Int, {p.n.tokens, p.n.num_experts_per_tok});
  check("h", h, x, real_of(x), {p.n.tokens, p.n.num_experts_per_tok, p.n.rank_of_expert});
  const Launch launch(x);  // the products of PyTorch too run on its device

  const Tensor none = empty(x, x.scalar_type(), {0});
  Tensor dx = none;
  if (wants[0] && weight) {
    dx = matrix_product(dy, *weight);
  } else if (wants[0]) {
    dx = empty(x, x.scalar_type(), {p.n.tokens, p.n.in_features});
    torch::stable::zero_(dx);
  }
  const Tensor dweight = wants[1] ? matrix_product(torch::stable::transpose(dy, 0, 1), x) : none;
  const int64_t over_tokens[] = {0};
  const Tensor dbias = wants[2] ? torch::stable::sum(dy, torch::headeronly::IntHeaderOnlyArrayRef(over_tokens, 1)) : none;
  const Tensor dvh = gradient(wants[3], vh, p.n.tokens), ds = gradient(wants[4], s, p.n.tokens);
  const Tensor du = gradient(wants[5], u, p.n.tokens), dexpert_bias = gradient(wants[6], expert_bias, p.n.tokens);
  const Tensor dweights = gradient(wants[7], weights, p.n.tokens);
  if (p.n.tokens > 0 && (needs & ~int64_t(0b110))) {
    p.dy = dy.const_data_ptr();
    p.x = x.const_data_ptr();
    p.x_stride = x.stride(0);
    p.vh = vh.const_data_ptr();
    p.s = static_cast<const float*>(s.const_data_ptr());
    p.u = u.const_data_ptr();
    p.expert_bias = expert_bias_ ? expert_bias.const_data_ptr() : nullptr;
    p.weights = static_cast<const float*>(weights.const_data_ptr());
    p.ids = static_cast<const int32_t*>(ids.const_data_ptr());
    p.h = static_cast<const float*>(h.const_data_ptr());
    p.dx = address(wants[0], dx);
    p.dvh = address(wants[3], dvh);
    p.ds = static_cast<float*>(address(wants[4], ds));
    p.du = address(wants[5], du);
    p.dexpert_bias = address(wants[6], dexpert_bias);
    p.dweights = static_cast<float*>(address(wants[7], dweights));
    run_backward(x, p);
  }
  return {dx, dweight, dbias, dvh, ds, du, dexpert_bias, dweights};
}

std::tuple<Tensor, Tensor> route_backward(const Tensor& dweights_, const Tensor& x_, const Tensor& router_,
                                          const Tensor& weights_, const Tensor& ids_, int64_t needs) {
  STD_TORCH_CHECK(x_.dim() == 2 && router_.dim() == 3 && ids_.dim() == 2,
                  "x, router, ids: expected [T, D], [N, g, D], [T, m]");
  const Tensor x = with_whole_rows(x_), router = packed(router_);
  const Tensor dweights = packed(dweights_), weights = packed(weights_), ids = packed(ids_);
  smile::RouteBackward p{};
  p.n = {x.size(0), x.size(1), 0, router.size(0), ids.size(1), 0, router.size(1), 0};
  check_device_limits(x, p.n);
  check("router", router, x, x.scalar_type(), {p.n.num_experts, p.n.rank_of_router, p.n.in_features});
  check("weights", weights, x, real_of(x), {p.n.tokens, p.n.num_experts_per_tok});
  check("ids", ids, x, ScalarType::Int, {p.n.tokens, p.n.num_experts_per_tok});
  check("dweights", dweights, x, real_of(x), {p.n.tokens, p.n.num_experts_per_tok});
  const bool wants_dx = needs & 1, wants_drouter = needs >> 1 & 1;
  const Tensor dx = wants_dx ? empty(x, x.scalar_type(), {p.n.tokens, p.n.in_features}) : empty(x, x.scalar_type(), {0});
  const Tensor drouter = gradient(wants_drouter, router, p.n.tokens);
  if (p.n.tokens > 0) {
    p.dweights = static_cast<const float*>(dweights.const_data_ptr());
    p.x = x.const_data_ptr();
    p.x_stride = x.stride(0);
    p.router = router.const_data_ptr();
    p.weights = static_cast<const float*>(weights.const_data_ptr());
    p.ids = static_cast<const int32_t*>(ids.const_data_ptr());
    p.dx = address(wants_dx, dx);
    p.drouter = address(wants_drouter, drouter);
    run_backward(x, p);
  }
  return {dx, drouter};
}

}  // namespace

#if !defined(SMILE_CUDA) || defined(SMILE_EMULATION)
SMILE_EXPANDED(STABLE_TORCH_LIBRARY, smile_kernels_ext, m) {
  m.def("route(Tensor x, Tensor router, int num_experts_per_tok) -> (Tensor weights, Tensor ids)");
  m.def("apply(Tensor x, Tensor weight, Tensor? bias, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, "
        "Tensor weights, Tensor ids, bool save, int[]? parts=None, int[]? rank_of_parts=None) -> (Tensor y, Tensor h)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, "
        "Tensor? router, int num_experts_per_tok, int rank_of_router, bool save, int[]? parts=None, int[]? rank_of_parts=None) -> "
        "(Tensor y, Tensor weights, Tensor ids, Tensor h)");
  const std::string experts =
      "Tensor x, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, Tensor? router, Tensor? weights, Tensor? ids, "
      "int num_experts_per_tok, int rank_of_router, bool save, int[]? parts=None, int[]? rank_of_parts=None";
  m.def(("delta(Tensor y, " + experts + ") -> (Tensor y, Tensor weights, Tensor ids, Tensor h)").c_str());
  m.def(("delta_(Tensor(a!) y, " + experts + ") -> (Tensor weights, Tensor ids, Tensor h)").c_str());
  m.def("evidence(Tensor x, Tensor router, Tensor? prior, Tensor? real, Tensor? factors, Tensor? before, Tensor? below, "
        "int num_experts_per_tok, int rank_of_router, int sequences, int scope, bool accumulates) -> "
        "(Tensor weights, Tensor ids, Tensor evidence, Tensor sums)");
  m.def("evidence_linear(Tensor x, Tensor weight, Tensor? bias, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, "
        "Tensor? router, Tensor? prior, Tensor? real, Tensor? factors, Tensor(a!)? sums, int past, Tensor? below, "
        "int num_experts_per_tok, int rank_of_router, int sequences, int scope, bool accumulates) -> "
        "(Tensor y, Tensor weights, Tensor ids, Tensor evidence)");
  m.def("apply_backward(Tensor dy, Tensor x, Tensor? weight, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, "
        "Tensor weights, Tensor ids, Tensor h, int needs) -> "
        "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dvh, Tensor ds, Tensor du, Tensor dexpert_bias, Tensor dweights)");
  m.def("route_backward(Tensor dweights, Tensor x, Tensor router, Tensor weights, Tensor ids, int needs) -> "
        "(Tensor dx, Tensor drouter)");
}
#endif

SMILE_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, smile_kernels_ext, SMILE_DEVICE, m) {
  m.impl("apply_backward", TORCH_BOX(&apply_backward));
  m.impl("evidence", TORCH_BOX(&evidence));
  m.impl("evidence_linear", TORCH_BOX(&evidence_linear));
  m.impl("route_backward", TORCH_BOX(&route_backward));
  m.impl("route", TORCH_BOX(&route));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("delta", TORCH_BOX(&delta));
  m.impl("delta_", TORCH_BOX(&delta_in_place));
}
