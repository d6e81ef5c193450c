// torch.ops.smile_kernels_ext: the operators as PyTorch sees them, in its stable ABI (2.10 and later).
// Shapes are checked here; smile.h has their meaning. Built without SMILE_CUDA this is the CPU library, which also
// defines the schemas; the CUDA library adds its kernels to them, so it is loaded after it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "smile.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

void check(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) fits = fits && t.size(i++) == size;
  if (fits && t.scalar_type() == dtype) return;
  std::string expected, got;
  for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t d = 0; d < t.dim(); ++d) got += (d ? ", " : "") + std::to_string(t.size(d));
  STD_TORCH_CHECK(fits, name, ": has shape [", got, "]; expected [", expected, "]");
  STD_TORCH_CHECK(false, name, ": has another dtype than expected beside this x");
}

// A contiguous tensor beside `like`; the shim's allocation costs a tenth of a call of aten::new_empty.
Tensor empty(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> shape) {
  int64_t strides[3], stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape.begin()[d]) strides[d] = stride;
  int32_t device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto raw_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.begin(), strides, raw_dtype, device,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

// at::linear through the dispatcher: the base product is the one users of nn.Linear know.
Tensor base_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                          torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void run(const Tensor& x, const smile::Forward& p) {
  smile::cpu_forward(dtype_of(x), p, [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
  });
}

// The tensors of one call, checked, as the kernels want them; it owns what had to be copied.
struct Call {
  const Tensor& x;
  smile::Forward p{};
  std::vector<Tensor> owned;
  std::optional<Tensor> weights, ids, h, y;

  explicit Call(const Tensor& x_) : x(x_) {
    STD_TORCH_CHECK(x.dim() == 2, "x: has ", x.dim(), " dimensions; expected [tokens, in_features]");
    p.n.tokens = x.size(0);
    p.n.in_features = x.size(1);
    p.x = x.const_data_ptr();
    p.x_stride[0] = x.stride(0);
    p.x_stride[1] = x.stride(1);
  }

  const void* contiguous(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    owned.push_back(torch::stable::contiguous(t));
    return owned.back().const_data_ptr();
  }

  // Routing by the first `rank` rows of each expert in `router`, which may be a view of vh: only its expert stride is free.
  void set_router(const char* name, const Tensor& router, int64_t rank, int64_t num_experts_per_tok) {
    STD_TORCH_CHECK(router.dim() == 3 && rank >= 1 && rank <= router.size(1), name, ": has ", router.dim(),
                    " dimensions; expected [N, rows, in_features] with at least ", rank, " rows");
    check(name, router, x.scalar_type(), {router.size(0), router.size(1), p.n.in_features});
    p.n.num_experts = router.size(0);
    p.n.rank_of_router = rank;
    p.n.num_experts_per_tok = num_experts_per_tok;
    STD_TORCH_CHECK(num_experts_per_tok >= 1 && num_experts_per_tok <= p.n.num_experts,
                    "num_experts_per_tok: is ", num_experts_per_tok, "; expected 1 to ", p.n.num_experts);
    const bool rows = router.stride(2) == 1 && router.stride(1) == p.n.in_features;
    p.router = rows ? router.const_data_ptr() : contiguous(router);
    p.router_expert_stride = rows ? router.stride(0) : router.size(1) * p.n.in_features;
    weights = empty(x, real_of(x), {p.n.tokens, num_experts_per_tok});
    ids = empty(x, ScalarType::Int, {p.n.tokens, num_experts_per_tok});
    p.weights = weights->mutable_data_ptr();
    p.ids = static_cast<int32_t*>(ids->mutable_data_ptr());
  }

  void set_routing(const Tensor& weights_, const Tensor& ids_) {
    p.n.num_experts_per_tok = ids_.dim() == 2 ? ids_.size(1) : 0;
    check("ids", ids_, ScalarType::Int, {p.n.tokens, p.n.num_experts_per_tok});
    check("weights", weights_, real_of(x), {p.n.tokens, p.n.num_experts_per_tok});
    p.weights = const_cast<void*>(contiguous(weights_));
    p.ids = static_cast<int32_t*>(const_cast<void*>(contiguous(ids_)));
  }

  void set_experts(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& vh, const Tensor& s,
                   const Tensor& u, const std::optional<Tensor>& expert_bias, bool save) {
    STD_TORCH_CHECK(weight.dim() == 2 && vh.dim() == 3 && s.dim() == 2,
                    "weight, vh, s: expected [out_features, in_features], [N, rows, in_features], [N, r]");
    const auto dtype = x.scalar_type();
    const int64_t out_features = p.n.out_features = weight.size(0), experts = p.n.num_experts = s.size(0);
    p.n.rank_of_expert = s.size(1);
    p.n.vh_rows = vh.size(1);
    STD_TORCH_CHECK(p.n.vh_rows >= p.n.rank_of_expert, "vh: has ", p.n.vh_rows, " rows; expected at least ",
                    p.n.rank_of_expert);
    check("weight", weight, dtype, {out_features, p.n.in_features});
    check("vh", vh, dtype, {experts, p.n.vh_rows, p.n.in_features});
    check("s", s, real_of(x), {experts, p.n.rank_of_expert});
    check("u", u, dtype, {experts, out_features, p.n.rank_of_expert});
    if (expert_bias) check("expert_bias", *expert_bias, dtype, {experts, out_features});
    p.vh = contiguous(vh);
    p.s = contiguous(s);
    p.u = contiguous(u);
    p.expert_bias = expert_bias ? contiguous(*expert_bias) : nullptr;
    h = save ? empty(x, real_of(x), {p.n.tokens, p.n.num_experts_per_tok, p.n.rank_of_expert})
             : empty(x, real_of(x), {0});
    p.h = save ? h->mutable_data_ptr() : nullptr;
    y = base_product(x, weight, bias);
    p.y = y->mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor> route(const Tensor& x, const Tensor& router, int64_t num_experts_per_tok) {
  Call call(x);
  call.set_router("router", router, router.dim() == 3 ? router.size(1) : 0, num_experts_per_tok);
  run(x, call.p);
  return {*call.weights, *call.ids};
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const Tensor& vh, const Tensor& s, const Tensor& u,
                                 const std::optional<Tensor>& expert_bias, const Tensor& weights, const Tensor& ids,
                                 bool save) {
  Call call(x);
  call.set_routing(weights, ids);
  call.set_experts(weight, bias, vh, s, u, expert_bias, save);
  for (int64_t e = 0; e < call.p.n.tokens * call.p.n.num_experts_per_tok; ++e)
    STD_TORCH_CHECK(call.p.ids[e] >= 0 && call.p.ids[e] < call.p.n.num_experts, "ids: holds ", call.p.ids[e],
                    "; expected 0 to ", call.p.n.num_experts - 1);
  run(x, call.p);
  return {*call.y, *call.h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& vh, const Tensor& s,
    const Tensor& u, const std::optional<Tensor>& expert_bias, const std::optional<Tensor>& router,
    int64_t num_experts_per_tok, int64_t rank_of_router, bool save) {
  Call call(x);
  call.p.tied_router = !router;
  call.set_router(router ? "router" : "vh", router ? *router : vh, rank_of_router, num_experts_per_tok);
  call.set_experts(weight, bias, vh, s, u, expert_bias, save);
  run(x, call.p);
  return {*call.y, *call.weights, *call.ids, *call.h};
}

}  // namespace

STABLE_TORCH_LIBRARY(smile_kernels_ext, m) {
  m.def("route(Tensor x, Tensor router, int num_experts_per_tok) -> (Tensor weights, Tensor ids)");
  m.def("apply(Tensor x, Tensor weight, Tensor? bias, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, "
        "Tensor weights, Tensor ids, bool save) -> (Tensor y, Tensor h)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, "
        "Tensor? router, int num_experts_per_tok, int rank_of_router, bool save) -> "
        "(Tensor y, Tensor weights, Tensor ids, Tensor h)");
}

STABLE_TORCH_LIBRARY_IMPL(smile_kernels_ext, CPU, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("linear", TORCH_BOX(&linear));
}
