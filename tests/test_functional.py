"""The public functions: shapes, dtypes, transforms; bad input is refused by name."""

import functools

import pytest
import torch

import smile_kernels as sk
from smile_kernels.functional import route, router_scores, select_experts, smile_delta, smile_linear
from smile_kernels.ops import reference
from smile_kernels.testing import Problem, assert_close, expectations
from tests.problems import ON_CPU, PARTS, call, check_parts, problem, problems_of_parts, side_by_side


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend):
    p = problem("top-2", dtype=torch.float64)
    names, leaves = zip(*((name, t.requires_grad_()) for name, t in p.tensors().items()))

    def f(*leaves):
        return call(Problem(**{**vars(p), **dict(zip(names, leaves))}), backend=backend)

    assert torch.autograd.gradcheck(f, leaves)


T, D, O, N, R, G = 4, 6, 5, 3, 2, 2


def differentiable(form: str, m: int, backend: str):
    """A call of the operators on float64 tensors, and the tensors."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    x, weight, bias, s = random(T, D), random(O, D), random(O), random(N, R)
    vh, u, expert_bias, router = random(N, R, D), random(N, O, R), random(N, O), random(N, G, D)
    options = {"num_experts_per_tok": m, "rank_of_router": G, "backend": backend}
    ids = torch.randint(-1, N, (T, m))
    calls = {
        "linear": (lambda *t: smile_linear(*t, **options), (x, weight, bias, vh, s, u, expert_bias, router)),
        "own rows": (lambda *t: smile_linear(*t, **options), (x, weight, None, vh, s, u)),
        "routed": (
            lambda w, *t: smile_linear(*t, routing=(w, ids), **options),
            (random(T, m), x, weight, bias, vh, s, u, expert_bias),
        ),
        "delta": (lambda *t: smile_delta(*t, **options), (random(T, O), x, vh, s, u, expert_bias, router)),
        "delta in place": (
            lambda y, *t: smile_delta(y.clone(), *t, inplace=not torch.is_grad_enabled(), **options),
            (random(T, O), x, vh, s, u),
        ),
        "parts": (
            lambda *t: smile_linear(*t, parts=(3, 1, 1), rank_of_parts=(2, 0, 1), **options),
            (x, weight, bias, random(3, N, R, D), random(3, N, R), u, expert_bias, random(3, N, G, D)),
        ),
        "route": (lambda *t: route(*t, num_experts_per_tok=m, rank_of_router=G, backend=backend)[0], (x, vh)),
    }
    return calls[form]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("form", ["linear", "own rows", "routed", "delta", "parts", "route"])
def test_second_and_forward_mode_derivatives(form, m, backend):
    call, inputs = differentiable(form, m, backend)
    if (form, m) != ("route", 1):  # whose weight is constant
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_under_compile_are_as_documented(backend):
    """Right by torch.func; of a compiled call PyTorch refuses them, or, where the backend is eager, has none."""
    call, (x, *layer) = differentiable("linear", 2, ON_CPU[0])

    def penalty(x):
        return call(x, *layer).pow(3).sum()

    def of_gradient(x):
        return torch.func.grad(lambda x: torch.func.grad(penalty)(x).pow(2).sum())(x)

    want = of_gradient(x.detach())
    torch.testing.assert_close(torch.compile(of_gradient, backend=backend)(x.detach()), want)
    compiled = torch.compile(call, backend=backend)
    (gradient,) = torch.autograd.grad(compiled(x, *layer).sum(), x, create_graph=True)
    if backend == "eager":
        assert not gradient.requires_grad
    else:
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            torch.autograd.grad(gradient.pow(2).sum(), x)


@pytest.mark.parametrize("form", ["linear", "routed", "delta", "delta in place", "parts", "route"])
@pytest.mark.parametrize("mode", ["inference", "frozen", "training"])
def test_tangents_where_no_gradient_is_needed(mode, form):
    call, inputs = differentiable(form, 2, ON_CPU[0])
    primals = tuple(t.detach() for t in inputs if t is not None)
    tangents = tuple(map(torch.randn_like, primals))
    with torch.set_grad_enabled(mode == "training"):
        taken = primals if mode == "frozen" else tuple(t.requires_grad_(mode == "training") for t in primals)
        got = torch.func.jvp(call, taken, tangents)[1].detach()
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (call(*(p.detach() + sign * step * t for p, t in zip(primals, tangents))) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["routing", "routing of rows", "routing_weights", "router", "delta", "parts"])
def test_gradients_with_a_graph_of_inputs_that_depend_on_each_other(form):
    """They are those without a graph: a routing from x, rows of a router from vh."""
    _, (x, weight, bias, vh, s, u, expert_bias, _) = differentiable("linear", 2, "torch")
    options = {"num_experts_per_tok": 2, "rank_of_router": G}

    def call(x, vh):
        given = weight, bias, vh, s, u, expert_bias
        scores = router_scores(x, vh, rank_of_router=G)
        if form == "delta":
            return smile_delta(x[:, :O].tanh(), x, *given[2:], routing=select_experts(scores, 2), **options)
        if form == "parts":
            weights, ids = (torch.stack([t, t.flip(-1)], 1) for t in select_experts(scores, 2))
            both = weight, bias, torch.stack([vh, 2 * vh]), torch.stack([s, s]), u, expert_bias
            return smile_linear(x, *both, routing=(weights, ids), parts=(3, 2), **options)
        kinds = {
            "routing": {"routing": select_experts(scores, 2)},
            "routing of rows": {"routing": route(x, vh, **options)},
            "routing_weights": {"routing_weights": scores.softmax(-1)},
            "router": {"router": vh[:, :G].tanh()},
        }
        return smile_linear(x, *given, **kinds[form], **options)

    dy = torch.randn(T, O, dtype=torch.float64)
    want = torch.autograd.grad(call(x, vh), (x, vh), dy)
    with_graph = torch.autograd.grad(call(x, vh), (x, vh), dy, create_graph=True)
    torch.testing.assert_close(with_graph, want)
    torch.testing.assert_close(torch.func.grad(lambda *t: (call(*t) * dy).sum(), (0, 1))(x, vh), want)
    assert torch.autograd.gradgradcheck(call, (x, vh), fast_mode=True)


@pytest.mark.parametrize("form", ["linear", "routed", "delta", "parts", "route"])
def test_products_of_torch_func(form):
    """vjp, whose products are computed after the call, and jacrev, also of frozen arguments; vmap of them."""
    call, inputs = differentiable(form, 2, ON_CPU[0])
    inputs = tuple(t for t in inputs if t is not None)
    y = call(*inputs)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, inputs, dy)
    for given in (inputs, tuple(t.detach() for t in inputs)):
        _, product = torch.func.vjp(call, *given)
        torch.testing.assert_close(product(dy), want)
        _, product = torch.func.vjp(lambda x, rest=given[1:]: call(x, *rest), given[0])
        torch.testing.assert_close(product(dy)[0], want[0])
        several = torch.func.vmap(product)(torch.stack([dy, 2 * dy]))[0]
        torch.testing.assert_close(several, torch.stack([want[0], 2 * want[0]]))
    rows = torch.func.jacrev(call, tuple(range(len(inputs))))(*inputs)
    for t, of in zip(want, rows):
        torch.testing.assert_close(torch.einsum("to,to...->...", dy, of), t)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_transforms(frozen):
    layer = sk.SmileLinear(D, O, N, R, G, 2, expert_bias=True, router=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_().requires_grad_(not frozen)
    x = torch.randn(T, D)

    def loss(x):
        return layer(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        compiled = torch.compile(transform(loss), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), transform(loss)(x), rtol=1e-4, atol=1e-4)


def test_second_derivatives_at_zero_scores():
    """An expert without router rows, and a token of zeros."""
    layer = sk.SmileLinear(D, O, N, R, G, 2, router=True, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        layer.router[1] = 0
    x, v = torch.randn(2, T, D, dtype=torch.float64)
    x[1] = 0

    def gradient(x):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    product, step = torch.func.jvp(gradient, (x,), (v,))[1], 1e-6
    assert product.isfinite().all()
    want = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    torch.testing.assert_close(product[[0, 2, 3]], want[[0, 2, 3]], rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()), create_graph=True)
    sum(g.square().sum() for g in found).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_gradients_of_each_sample():
    layer = sk.SmileLinear(D, O, N, R, G, 2, expert_bias=True, router=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x, values = torch.randn(T, D), dict(layer.named_parameters())

    def loss(values, row):
        return torch.func.functional_call(layer, values, (row[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    assert found.keys() == values.keys()
    for row in range(T):
        want = torch.autograd.grad(layer(x[row : row + 1]).square().sum(), list(values.values()))
        for name, gradient in zip(values, want):
            torch.testing.assert_close(found[name][row], gradient, rtol=1e-4, atol=1e-4)


def test_a_layer_under_transforms():
    """Products with the Hessian, also vectorised and under autocast, of a layer that routes itself."""
    layer = sk.SmileLinear(D, O, N, R, G, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x, v = torch.randn(2, T, D, dtype=torch.float64)

    def loss(x):
        return layer(x).square().sum()

    want = torch.autograd.functional.hvp(loss, x, v)[1]
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1], want)
    torch.testing.assert_close(torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x), want)
    rows = torch.func.vmap(torch.func.hessian(lambda row: loss(row[None])))(x)
    torch.testing.assert_close(torch.einsum("tij,tj->ti", rows, v), want)
    step = 1e-6
    ahead, behind = (torch.func.grad(loss)(x + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), want, rtol=1e-4, atol=1e-5)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, tangent = torch.func.jvp(layer, (x.float(),), (v.float(),))
    assert y.dtype == tangent.dtype == torch.bfloat16
    exact = torch.func.jvp(layer, (x.float(),), (v.float(),))[1]
    assert (tangent.float() - exact).norm() < 0.05 * exact.norm()


def test_only_the_gradients_asked_for():
    p = problem("top-2")
    p.u.requires_grad_()
    call(p).sum().backward()
    assert p.u.grad is not None
    assert all(t.grad is None for name, t in p.tensors().items() if name != "u")


@pytest.mark.parametrize("leading", [(), (0,), (3, 0), (2, 5), (2, 1, 3)], ids=str)
def test_any_leading_shape(leading):
    p = problem("top-2")
    x = torch.randn(*leading, p.x.shape[1], requires_grad=True)
    y = call(Problem(**{**vars(p), "x": x}))
    assert y.shape == (*leading, p.weight.shape[0])
    flat = call(Problem(**{**vars(p), "x": x.reshape(-1, x.shape[-1])}))
    torch.testing.assert_close(y.reshape(flat.shape), flat, rtol=0, atol=0)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_non_contiguous_input_and_parameters():
    p = problem("top-2")
    q = Problem(**{**vars(p), **{k: getattr(p, k).mT.contiguous().mT for k in ("x", "vh", "u")}})
    assert not q.x.is_contiguous()
    torch.testing.assert_close(call(q), call(p))
    x = torch.randn(6, 2, p.x.shape[1])[:, 0]
    torch.testing.assert_close(call(Problem(**{**vars(p), "x": x})), call(Problem(**{**vars(p), "x": x.contiguous()})))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_routing_is_float32_whatever_the_dtype(dtype):
    p = Problem.random(4096, 64, 8, 16, 4, 4, 2, dtype=dtype)
    weights, ids = route(p.x, p.vh, num_experts_per_tok=2, rank_of_router=4)
    assert weights.dtype == torch.float32
    exact = reference.scores(p.x.double(), p.rows().double())
    chosen = exact.gather(1, ids.long())
    # Scores that are equal up to float32 summation may swap, others may not.
    assert torch.all(chosen[:, 0] >= exact.amax(-1) * (1 - 1e-5))
    torch.testing.assert_close(weights.double(), chosen.softmax(-1), rtol=0, atol=5e-5)


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    for m in (1, 2, 3):
        ids = select_experts(scores, m)[1]
        assert ids.tolist() == [[1, 2, 3][:m], [0, 1, 2][:m]]


def test_one_bad_score_spoils_no_other():
    scores = torch.tensor([[float("nan"), 1.0, 2.0], [float("inf"), 1.0, 2.0]])
    weights, ids = select_experts(scores, 2)
    assert ids.tolist() == [[2, 1], [0, 2]]
    assert weights.isfinite().all()


def test_an_infinite_row_leaves_the_others_alone():
    p = problem("top-2")
    want = call(p)
    p.x[3, 2] = float("inf")
    got = call(p)
    keep = torch.arange(p.x.shape[0]) != 3
    torch.testing.assert_close(got[keep], want[keep])
    assert not got[3].isfinite().any()


def test_routing_weights_are_selected_and_renormalised():
    p = problem("top-2")
    given_weights = torch.rand(p.x.shape[0], p.s.shape[0])
    top, ids = given_weights.topk(2)
    want = call(p, routing=(top / top.sum(-1, keepdim=True), ids))
    torch.testing.assert_close(call(p, routing_weights=given_weights), want)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("backend", ON_CPU)
def test_routing_weights_of_zero_select_no_expert(backend, m):
    p = problem("top-2", dtype=torch.float64)
    given = torch.rand(len(p.x), 5, dtype=torch.float64)
    given[0], given[1, 1:], given[2] = 0, 0, given[2] * 1e300
    given[3] = torch.tensor([5e-324, 0, 0, 0, 0])
    top, ids = given.topk(m)
    total = (top / top[:, :1].clamp_min(5e-324)).sum(-1, keepdim=True).clamp_min(1)
    routing = top / top[:, :1].clamp_min(5e-324) / total, torch.where(top > 0, ids, -1)
    given.requires_grad_()
    got = call(p, routing_weights=given, num_experts_per_tok=m, backend=backend)
    torch.testing.assert_close(got, reference.apply(*p.arguments()[:7], *routing))
    torch.testing.assert_close(got[0], torch.nn.functional.linear(p.x[0], p.weight, p.bias))
    assert torch.autograd.grad(got.sum(), given)[0][[0, 1, 4]].isfinite().all()


def test_route_agrees_with_scores_and_softmax_over_all():
    p = problem("top-2")
    weights, ids = route(p.x, p.vh, num_experts_per_tok=2, rank_of_router=p.rank_of_router)
    scores = router_scores(p.x, p.vh, rank_of_router=p.rank_of_router)
    probability, want = scores.softmax(-1).topk(2)
    assert torch.equal(ids.long(), want)
    torch.testing.assert_close(weights, probability / probability.sum(-1, keepdim=True))


def test_autocast_returns_what_linear_returns():
    p = problem("top-2")
    with torch.autocast("cpu", torch.bfloat16):
        y = call(p)
        assert y.dtype == torch.nn.functional.linear(p.x, p.weight).dtype == torch.bfloat16
    torch.testing.assert_close(y, call(p.to(torch.bfloat16)))


def test_vmap_over_inputs_over_experts_and_through_gradients():
    p = problem("top-2")
    x = torch.randn(3, 4, p.x.shape[1])

    def f(x, u):
        return call(Problem(**{**vars(p), "x": x, "u": u}))

    torch.testing.assert_close(torch.func.vmap(f, (0, None))(x, p.u), torch.stack([f(v, p.u) for v in x]))
    us = torch.stack([p.u, 2 * p.u, -p.u])
    torch.testing.assert_close(torch.func.vmap(f)(x, us), torch.stack([f(v, w) for v, w in zip(x, us)]))
    gradient = torch.func.grad(lambda x, u: f(x, u).square().sum())
    torch.testing.assert_close(torch.func.vmap(gradient, (0, None))(x, p.u), torch.stack([gradient(v, p.u) for v in x]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(3, 7)}),
        ("x", {"x": torch.zeros(3, 23, dtype=torch.bfloat16)}),
        ("x", {"x": torch.zeros(3, 23, dtype=torch.int64)}),
        ("weight", {"weight": torch.zeros(29)}),
        ("bias", {"bias": torch.zeros(28)}),
        ("vh", {"vh": torch.zeros(5, 6, 23)}),
        ("s", {"s": torch.zeros(5)}),
        ("s", {"s": torch.zeros(5, 3, dtype=torch.float64)}),
        ("u", {"u": torch.zeros(5, 3, 29)}),
        ("expert_bias", {"expert_bias": torch.zeros(29)}),
        ("router", {"router": torch.zeros(5, 6, 23)}),
        ("num_experts_per_tok", {"num_experts_per_tok": 6}),
        ("num_experts_per_tok", {"num_experts_per_tok": 0}),
        ("rank_of_router", {"rank_of_router": 0}),
    ],
)
def test_bad_input_is_named(name, change):
    p = problem("top-2")
    with pytest.raises(ValueError, match=f"^{name}:"):
        call(Problem(**{**vars(p), **change}))


@pytest.mark.parametrize("backend", ON_CPU)
def test_ids_out_of_range_are_named(backend):
    p = problem("top-2")
    weights, ids = route(p.x, p.vh, num_experts_per_tok=2, rank_of_router=7)
    for bad in (5, -2, 2**32, -(2**40)):
        wrong = ids.long()
        wrong[3, 1] = bad
        with pytest.raises(sk.SmileError, match=f"^ids: contains {bad}; expected 0 to 4, or -1 for no expert$"):
            call(p, routing=(weights, wrong), backend=backend)
        numbers = {"num_experts_per_tok": 2, "rank_of_router": 7, "routing": (weights, wrong), "backend": backend}
        with pytest.raises(sk.SmileError, match=f"^ids: contains {bad}; expected 0 to 4"):
            smile_delta(torch.zeros(len(p.x), len(p.weight)), p.x, p.vh, p.s, p.u, p.expert_bias, **numbers)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"routing\[1\]: is torch"):
            call(p, routing=(weights, ids.to(dtype)), backend=backend)


@torch.no_grad()
def test_ids_of_a_layer_s_own_policy_are_named():
    layer = sk.SmileLinear(6, 5, 3, 2, 2)
    for bad in (3, -2):
        layer.router_policy = lambda _, x, bad=bad: (torch.ones(len(x), 1), torch.full((len(x), 1), bad).int())
        with pytest.raises(sk.SmileError, match=f"^ids: contains {bad}; expected 0 to 2, or -1 for no expert$"):
            layer(torch.ones(4, 6))


@pytest.mark.parametrize("name", ["weight", "bias", "vh", "s", "u", "expert_bias", "router"])
def test_a_tensor_on_another_device_is_named(name):
    p = problem("top-2", router=True)
    setattr(p, name, getattr(p, name).to("meta"))
    with pytest.raises(ValueError, match=f"^{name}: is on meta; expected x's device, cpu"):
        call(p)


def test_bad_routing_is_named():
    p = problem("top-2")
    t = p.x.shape[0]
    with pytest.raises(ValueError, match=r"^routing_weights:"):
        call(p, routing_weights=torch.rand(t, 4))
    with pytest.raises(ValueError, match=r"^routing\[0\]:"):
        call(p, routing=(torch.rand(t, 1), torch.zeros(t, 2, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"^routing\[1\]:"):
        call(p, routing=(torch.rand(t - 1, 2), torch.zeros(t - 1, 2, dtype=torch.int32)))
    ids = torch.zeros(t, 2, dtype=torch.int32)
    for name, given in (
        (r"routing_weights: is torch.complex64; expected real", {"routing_weights": torch.rand(t, 5) * 1j}),
        (r"routing_weights: is on meta", {"routing_weights": torch.rand(t, 5, device="meta")}),
        (r"routing\[0\]: is torch.complex64; expected real", {"routing": (torch.rand(t, 2) * 1j, ids)}),
    ):
        with pytest.raises(sk.SmileError, match=f"^{name}"):
            call(p, **given)
    with pytest.raises(ValueError, match=r"^routing_weights: .*routing"):
        call(p, routing_weights=torch.rand(t, 5), routing=(torch.rand(t, 2), torch.zeros(t, 2)))


@pytest.mark.parametrize("wrong", [-1.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("parts", [(), (29,)], ids=str)
def test_wrong_routing_weights_are_named(wrong, parts):
    p = problem("top-2")
    p = Problem(**{**vars(p), "vh": p.vh[None], "s": p.s[None]}) if parts else p
    weights = torch.rand(len(p.x), *[1] * len(parts), 5)
    options = {"parts": parts} if parts else {}
    want = call(p, routing_weights=weights.index_fill(-1, torch.tensor(2), 0), **options)
    weights[..., 2] = wrong
    with pytest.raises(sk.SmileError, match=f"^routing_weights: contains {wrong}; expected finite numbers, 0 or more$"):
        call(p, routing_weights=weights, **options)
    compiled = torch.compile(lambda w: call(p, routing_weights=w, **options), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(weights), want)  # as on a GPU, they count as 0


def test_meta_tensors_give_a_meta_tensor():
    p = problem("top-2")
    meta = [t if t is None else t.to("meta") for t in p.arguments()]
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router}
    y = smile_linear(*meta, **options)
    assert y.device.type == "meta"
    assert y.shape == call(p).shape


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def delta_beside(x, weight, bias, vh, s, u, expert_bias, router, **options):
    """smile_linear with a separate base product."""
    return smile_delta(torch.nn.functional.linear(x, weight, bias), x, vh, s, u, expert_bias, router, **options)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["routes", "given"])
def test_delta_matches_reference(backend, dtype, given):
    for shape in ("one-token", "top-2", "all", "many-tokens"):
        p = problem(shape, dtype=dtype, router=shape == "all")
        weights, ids = reference.route(p.x.double(), p.rows().double(), p.num_experts_per_tok)
        weights = torch.rand_like(weights, dtype=p.s.dtype) if given else None
        leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
        options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router, "backend": backend}
        if given:
            leaves["weights"], options["routing"] = weights.requires_grad_(), (weights, ids)
        y = delta_beside(*p.arguments(), **options)
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
        want = expectations(p, ids, weights=weights, dy=dy)
        assert_close("y", y.detach(), *want["y"])
        for name, gradient in zip(leaves, gradients):
            if not (given and name == "router"):
                assert_close(f"d{name}", gradient, *want[name])
        base = torch.nn.functional.linear(p.x, p.weight, p.bias).detach()
        with torch.no_grad():
            experts = p.x, p.vh, p.s, p.u, p.expert_bias, p.router
            apart = smile_delta(base, *experts, **options)
            into = torch.full((base.shape[0], base.shape[1] + 5), torch.nan, dtype=dtype)
            into[:, 3:-2] = base
            out = smile_delta(into[:, 3:-2], *experts, **options, inplace=True)
        assert out.data_ptr() == into[:, 3:-2].data_ptr()
        assert torch.equal(out, apart)
        assert into[:, :3].isnan().all()
        assert into[:, -2:].isnan().all(), "outputs of others are written"
        assert_close("y without gradients", apart, *want["y"])


def test_the_gradient_of_a_base_product_passes_through():
    p = problem("top-2")
    y = torch.nn.functional.linear(p.x, p.weight, p.bias).requires_grad_()
    out = smile_delta(y, p.x, p.vh, p.s, p.u, p.expert_bias, num_experts_per_tok=2, rank_of_router=7)
    dy = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, y, dy)[0], dy)


def test_what_cannot_be_added_to_in_place_is_refused_by_name():
    p = problem("top-2")
    options = {"num_experts_per_tok": 2, "rank_of_router": 7, "inplace": True}
    experts = p.x, p.vh, p.s, p.u, p.expert_bias
    y = torch.nn.functional.linear(p.x, p.weight)
    for name, tensor in (("y", y), ("u", p.u), ("expert_bias", p.expert_bias)):
        tensor.requires_grad_()
        before = y.detach().clone()
        with pytest.raises(
            ValueError, match=f"inplace: is True, and {name} needs a gradient; expected False, or torch"
        ):
            smile_delta(y, *experts, **options)
        assert torch.equal(y, before)
        tensor.requires_grad_(False)
    with pytest.raises(ValueError, match=r"y: has strides \(1, 17\); expected contiguous rows"):
        smile_delta(y.T.contiguous().T, *experts, **options)
    with pytest.raises(ValueError, match=r"y: has strides \(0, 1\); expected contiguous rows"):
        smile_delta(y[:1].expand_as(y), *experts, **options)
    with pytest.raises(ValueError, match=r"y: has shape \[16, 29\]; expected \[17, 29\]"):
        smile_delta(y[:-1], *experts, **options)
    with pytest.raises(ValueError, match=r"y: is torch\.float64; expected x's dtype, torch\.float32"):
        smile_delta(y.double(), *experts, **options)
    square = Problem.random(6, 12, 12, 3, 4, 2)
    with pytest.raises(ValueError, match="y: is x itself"):
        smile_delta(
            square.x,
            *square.arguments()[:1],
            *square.arguments()[3:7],
            **{**options, "num_experts_per_tok": 1, "rank_of_router": 2},
        )


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", PARTS)
@pytest.mark.parametrize("router", [False, True], ids=["tied", "own-router"])
def test_parts_match_reference(backend, dtype, layout, router):
    sizes, ranks = PARTS[layout]
    for tokens in (5, 45):
        problems = problems_of_parts(sizes, ranks, tokens, 33, 4, 4, 2, dtype=dtype, router=router, bias=router)
        for layer in (smile_linear, delta_beside):
            for backward in (False, True):
                check_parts(problems, ranks, functools.partial(layer, backend=backend), backward=backward)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layout", PARTS)
def test_parts_of_a_given_routing_match_reference(backend, layout):
    sizes, ranks = PARTS[layout]
    for tokens, dtype in ((3, torch.float32), (50, torch.bfloat16)):
        problems = problems_of_parts(sizes, ranks, tokens, 33, 4, 4, 2, dtype=dtype, expert_bias=tokens == 3)
        routing = torch.rand(tokens, len(sizes), 3), torch.randint(-1, 4, (tokens, len(sizes), 3), dtype=torch.int32)
        for p in problems:
            p.num_experts_per_tok = 3
        for backward in (False, True):
            layer = functools.partial(smile_linear, backend=backend)
            check_parts(problems, ranks, layer, backward=backward, routing=routing)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tokens", [1, 90])
def test_one_part_is_the_layer_itself(backend, tokens):
    p = Problem.random(tokens, 65, 70, 5, 6, 4, 2)
    q = Problem(**{**vars(p), "vh": p.vh[None], "s": p.s[None]})
    assert torch.equal(call(q, backend=backend, parts=[70]), call(p, backend=backend))


def test_singular_values_of_zero_cost_nothing_and_change_nothing():
    p = Problem.random(50, 65, 70, 5, 16, 4, 2)
    p.s[:, 9:], p.s[2] = 0, 0
    ids = reference.route(p.x, p.rows(), 2)[1]
    assert_close("y", call(p), *expectations(p, ids)["y"])


def test_weights_over_the_experts_of_each_part():
    sizes, ranks = PARTS["three, one dense"]
    problems = problems_of_parts(sizes, ranks, 9, 33, 4, 4, 2)
    scores = torch.rand(9, 3, 4)
    options = {"num_experts_per_tok": 2, "rank_of_router": 4, "parts": sizes, "rank_of_parts": ranks}
    arguments = problems[0].x, *side_by_side(problems, ranks).values()
    weights, ids = scores.sort(-1, descending=True)
    routing = weights[..., :2] / weights[..., :2].sum(-1, keepdim=True), ids[..., :2]
    got = smile_linear(*arguments, **options, routing_weights=scores)
    torch.testing.assert_close(got, smile_linear(*arguments, **options, routing=routing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_under_autocast_vmap_and_any_leading_shape(dtype):
    sizes, ranks = PARTS["four"]
    problems = problems_of_parts(sizes, ranks, 6, 33, 4, 4, 2)
    options = {"num_experts_per_tok": 2, "rank_of_router": 4, "parts": sizes, "rank_of_parts": ranks}
    tensors = side_by_side(problems, ranks).values()
    want = smile_linear(problems[0].x, *tensors, **options)
    got = smile_linear(problems[0].x.view(2, 3, 33), *tensors, **options)
    torch.testing.assert_close(got, want.view(2, 3, -1))
    mapped = torch.func.vmap(lambda x: smile_linear(x, *tensors, **options))(problems[0].x)
    torch.testing.assert_close(mapped, want)
    with torch.autocast("cpu", dtype):
        cast = smile_linear(problems[0].x, *tensors, **options)
    low = [t if t is None or i == 3 else t.to(dtype) for i, t in enumerate(tensors)]
    assert cast.dtype == dtype
    assert torch.equal(cast, smile_linear(problems[0].x.to(dtype), *low, **options))


@pytest.mark.parametrize("backend", ON_CPU)
def test_parts_and_deltas_compile_and_export(backend):
    sizes, ranks = PARTS["three, one dense"]
    problems = problems_of_parts(sizes, ranks, 12, 33, 4, 4, 2)
    tensors = [t.nan_to_num() for t in side_by_side(problems, ranks).values() if t is not None]
    options = {"num_experts_per_tok": 2, "rank_of_router": 4, "backend": backend}
    parts = {"parts": sizes, "rank_of_parts": ranks, **options}

    def f(x, tensors):
        return smile_linear(x, *tensors, **parts)

    def g(x, tensors):
        weight, bias, *experts = tensors
        y = torch.nn.functional.linear(x, weight, bias)
        return smile_delta(
            smile_delta(y, x, *experts, **parts), x, *experts, **parts, inplace=not torch.is_grad_enabled()
        )

    for function in (f, g):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(problems[0].x, tensors), function(problems[0].x, tensors))
            if function is f:
                program = torch.export.export(_Module(function), (problems[0].x, tensors))
                torch.testing.assert_close(program.module()(problems[0].x, tensors), function(problems[0].x, tensors))
        results = []
        for called in (compiled, function):
            leaves = [t.clone().requires_grad_() for t in (problems[0].x, *tensors)]
            results.append(torch.autograd.grad(called(leaves[0], leaves[1:]).square().sum(), leaves))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, tensors):
        return self.function(x, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": (5, 4)}, r"parts: is \(5, 4\), 9 together; expected the 10 outputs of the layer"),
        ({"parts": (4, 0, 6)}, "parts: is 0; expected 1 or more"),
        ({"parts": ()}, "parts: is empty; expected the number of outputs of each part"),
        ({"parts": (2, 3, 5)}, r"s: has shape \[2, 3, 4\]; expected \[3, N, r\]"),
        ({"parts": None}, r"s: has shape \[2, 3, 4\]; expected \[N, r\]"),
        ({"parts": None, "rank_of_parts": (1, 1)}, "rank_of_parts: is .*, and parts is None"),
        ({"rank_of_parts": (1,)}, r"rank_of_parts: is \(1,\); expected 2 numbers, one for each part"),
        ({"rank_of_parts": (1, 5)}, "rank_of_parts: is 5; expected 0 to 4, the ranks of s"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    problems = problems_of_parts((4, 6), (4, 4), 5, 12, 3, 2, 1)
    options = {"num_experts_per_tok": 1, "rank_of_router": 2, "parts": (4, 6), **change}
    with pytest.raises(sk.SmileError, match=message):
        smile_linear(problems[0].x, *side_by_side(problems, (4, 4)).values(), **options)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999, 1.0, 1])
def test_the_fewest_experts_whose_weights_reach_top_p(top_p):
    scores = (3 * torch.randn(40, 6, dtype=torch.float64)).requires_grad_()
    scores.data[0, :] = 1.0  # all equal
    weights, ids = select_experts(scores, 4, top_p)
    counts = set()
    for t in range(len(scores)):
        order = sorted(range(6), key=lambda i: (-float(scores[t, i]), i))[:4]
        p = torch.tensor([float(scores[t, i]) for i in order]).double().softmax(0)
        count = next((k for k in range(1, 4) if float(p[:k].sum()) >= top_p), 4) if top_p < 1 else 4
        counts.add(count)
        assert ids[t].tolist() == order[:count] + [-1] * (4 - count)
        torch.testing.assert_close(weights[t, :count], p[:count] / p[:count].sum())
        assert not weights[t, count:].any()
    assert len(counts) > 1 or top_p in (0.05, 1)
    if 0.05 < top_p < 1:
        assert torch.autograd.gradcheck(
            lambda s: select_experts(s, 4, top_p)[0], (scores[1:5].detach().requires_grad_(),)
        )


def test_experts_beyond_top_p_do_no_work():
    p = problem("top-2")
    n = p.s.shape[0]
    scores = router_scores(p.x, p.vh, rank_of_router=1) * 3
    weights, ids = select_experts(scores, n, 0.6)
    assert (ids < 0).any()
    dense = torch.zeros_like(scores).scatter_add(-1, ids.clamp_min(0).long(), weights)
    want = call(p, routing=(dense, torch.arange(n).expand(len(dense), -1)))
    torch.testing.assert_close(call(p, routing=(weights, ids)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_p", [0, 1.5, -0.1, float("nan"), True, "0.5", None])
def test_top_p_out_of_range_is_named(top_p):
    with pytest.raises(ValueError, match=r"top_p: is .*; expected a number above 0, at most 1"):
        select_experts(torch.rand(2, 3), 2, top_p)
