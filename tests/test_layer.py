"""The torch backend, forward and backward, against the float64 reference; and the layer as users hold it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import smile_kernels as sk
from smile_kernels.functional import route, router_scores, select_experts, smile_linear
from smile_kernels.ops import composed, extension, library, reference
from smile_kernels.testing import Problem, assert_close, expectations

ON_CPU = [backend for backend in ("torch", "cpu") if library.why_not(backend, "cpu") is None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# tokens, D, O, N, r, g, m
SHAPES = {
    "one-token": (1, 24, 16, 4, 4, 3, 1),
    "top-1": (33, 24, 16, 5, 4, 3, 1),
    "top-2": (17, 23, 29, 5, 3, 7, 2),
    "all": (9, 16, 31, 3, 6, 2, 3),
    "single-expert": (7, 12, 10, 1, 5, 5, 1),
    "rank-1": (60, 12, 10, 4, 1, 1, 2),
    "many-tokens": (300, 16, 24, 8, 4, 4, 1),
}


def problem(shape: str, seed: int = 0, **options) -> Problem:
    t, d, o, n, r, g, m = SHAPES[shape]
    return Problem.random(t, d, o, n, r, g, m, seed=seed, **options)


def call(p: Problem, **options) -> torch.Tensor:
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router, **options}
    return smile_linear(*p.arguments(), **options)


@pytest.fixture(params=["own tokens", "every token", "every expert"])
def way(request, monkeypatch):
    """Each way in which the composition computes experts on a CPU, whatever the size of the problem."""
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "torch")
    always = 2**62 * (request.param != "own tokens")
    monkeypatch.setattr(composed, "EVERY_TOKEN", dict.fromkeys(DTYPES, always))
    monkeypatch.setattr(composed, "EVERY_EXPERT", 2**62 * (request.param == "every expert"))
    return request.param


def agrees_with_the_reference(p: Problem) -> None:
    """y and the gradient of every tensor."""
    leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
    y = call(p, backend="torch")
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves.values(), dy)
    _, ids = reference.route(p.x.detach(), p.rows().detach(), p.num_experts_per_tok)
    expected = expectations(p, ids, dy=dy)
    assert_close("y", y, *expected["y"])
    for name, gradient in zip(leaves, gradients):
        assert gradient.dtype == leaves[name].dtype
        assert_close(f"d{name}", gradient, *expected[name])


@pytest.mark.parametrize("router", [False, True], ids=["tied", "separate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_match_the_reference(way, shape, dtype, router):
    p = problem(shape, dtype=dtype, router=router, bias=shape != "rank-1", expert_bias=shape != "all")
    agrees_with_the_reference(p)


@pytest.mark.parametrize("shape", ["top-1", "top-2", "all", "many-tokens"])
def test_one_product_for_router_and_experts(monkeypatch, shape):
    """What pays in bfloat16 from a few tokens on, on layers wide enough."""
    t, d, o, n, r, _, m = SHAPES[shape]
    p = Problem.random(t, d, o, n, r, r, m, dtype=torch.bfloat16)
    assert not composed._one_product_pays(p.x, p.vh, p.u, m, r)
    monkeypatch.setattr(composed, "TWO_PRODUCTS", 0)
    assert composed._one_product_pays(p.x, p.vh, p.u, m, r)
    monkeypatch.setattr(composed, "route", None)
    for every_expert in (0, 2**62):
        monkeypatch.setattr(composed, "EVERY_EXPERT", every_expert)
        agrees_with_the_reference(p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_routing_with_duplicate_experts(way, dtype):
    p = problem("top-2", dtype=dtype)
    t, n = p.x.shape[0], p.s.shape[0]
    ids = torch.randint(n, (t, 3))
    ids[0] = ids[0, 0]
    weights = torch.rand(t, 3, dtype=p.s.dtype, requires_grad=True)
    leaves = {name: v.requires_grad_() for name, v in p.tensors().items()}
    y = call(p, routing=(weights, ids))
    dy = torch.randn_like(y)
    expected = expectations(p, ids, weights=weights, dy=dy)
    assert_close("y", y, *expected["y"])
    for name, leaf in {**leaves, "weights": weights}.items():
        gradient = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
        assert_close(f"d{name}", gradient, *expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2])
def test_runs_of_tokens_that_chose_alike(monkeypatch, dtype, m):
    """As routing policies give sequences: an expert may have several runs; a change of one slot ends a run."""
    monkeypatch.setattr(composed, "LONG_RUN", 3)
    monkeypatch.setattr(composed, "_sorted", None)
    monkeypatch.setattr(composed, "EVERY_TOKEN", dict.fromkeys(DTYPES, 0))
    p = problem("top-2", dtype=dtype)
    ids = torch.tensor([[2, 0], [1, 0], [2, 3], [0, 1]])[:, :m].repeat_interleave(torch.tensor([6, 1, 5, 5]), 0)
    weights = torch.rand(17, m, dtype=p.s.dtype, requires_grad=True)
    leaves = {name: v.requires_grad_() for name, v in p.tensors().items()}
    y = call(p, routing=(weights, ids), backend="torch")
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [*leaves.values(), weights], dy)
    expected = expectations(p, ids, weights=weights, dy=dy)
    assert_close("y", y, *expected["y"])
    for name, gradient in zip([*leaves, "weights"], gradients):
        assert_close(f"d{name}", gradient, *expected[name])


def on_blocks(monkeypatch, p: Problem, weights, ids, dy, block):
    """Drive the padded layout, which devices other than the CPU take, through the meta of a CPU tensor."""
    monkeypatch.setattr(composed, "BLOCK", block)
    monkeypatch.setattr(composed, "_host_reads_are_free", lambda x: False)
    args = p.arguments()[:7]
    y, h = composed.apply(*args, weights, ids, True)
    x, weight, _, vh, s, u, expert_bias = args
    needs = [True, True, True, True, True, True, expert_bias is not None, True]
    return y, composed.apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs)


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["one-token", "top-2", "all"])
def test_padded_blocks_match_the_reference(monkeypatch, shape, dtype, block):
    p = problem(shape, dtype=dtype)
    weights, ids = reference.route(p.x, p.rows(), p.num_experts_per_tok)
    dy = torch.randn(p.x.shape[0], p.weight.shape[0]).to(dtype)
    y, gradients = on_blocks(monkeypatch, p, weights, ids, dy, block)
    expected = expectations(p, ids, weights=weights, dy=dy)
    assert_close("y", y, *expected["y"])
    for name, gradient in zip(("x", "weight", "bias", "vh", "s", "u", "expert_bias", "weights"), gradients):
        assert_close(f"d{name}", gradient, *expected[name])


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("blocks", [False, True], ids=["loop", "blocks"])
def test_an_id_of_minus_one_is_no_expert(way, monkeypatch, m, blocks):
    """Its weight is ignored and has no gradient, for some slots, for whole tokens, and for all of a run of tokens."""
    monkeypatch.setattr(composed, "_host_reads_are_free", lambda x: not blocks)
    for tokens, share in ((9, 0.3), (300, 0.3), (5, 1.0)):
        p = Problem.random(tokens, 24, 16, 4, 4, 3, m, dtype=torch.float64)
        weights, ids = route(p.x, p.vh, num_experts_per_tok=m, rank_of_router=3)
        absent = torch.rand(tokens, m) < share
        absent[2] = True
        ids[absent], weights[absent] = -1, float("nan")
        leaves = {name: t.requires_grad_() for name, t in (p.tensors() | {"weights": weights}).items()}
        y = call(p, routing=(weights, ids), backend="torch")
        dy = torch.randn_like(y)
        expected = expectations(p, ids, weights=weights, dy=dy)
        assert_close("y", y, *expected["y"])
        for name, gradient in zip(leaves, torch.autograd.grad(y, leaves.values(), dy)):
            assert_close(f"d{name}", gradient, *expected[name])
        assert not expected["weights"][0][absent].any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend):
    p = problem("top-2", dtype=torch.float64)
    names, leaves = zip(*((name, t.requires_grad_()) for name, t in p.tensors().items()))

    def f(*leaves):
        return call(Problem(**{**vars(p), **dict(zip(names, leaves))}), backend=backend)

    assert torch.autograd.gradcheck(f, leaves)


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
    # Two scores closer than float32 summation resolves may swap; none further apart may.
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


def layer(shape: str = "top-2", **options) -> sk.SmileLinear:
    _, d, o, n, r, g, m = SHAPES[shape]
    return sk.SmileLinear(d, o, n, r, g, m, **options)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_fullgraph_compile_with_dynamic_tokens(training):
    torch._dynamo.reset()
    module = layer().requires_grad_(training)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 11, 2):
        x = torch.randn(tokens, module.in_features, requires_grad=training)
        want = module(x)
        got = compiled(x)
        torch.testing.assert_close(got, want)
        if training:
            want_gradient = torch.autograd.grad(want.square().sum(), (x, *module.parameters()))
            got_gradient = torch.autograd.grad(got.square().sum(), (x, *module.parameters()))
            torch.testing.assert_close(got_gradient, want_gradient)


def test_export_with_dynamic_tokens():
    module = layer()
    tokens = torch.export.Dim("tokens")
    x = torch.randn(4, module.in_features)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},), strict=False)  # as from torch 2.8 on
    x = torch.randn(9, module.in_features)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", ["top-1", "top-2"])
def test_operators_pass_opcheck(shape, backend):
    p = problem(shape)
    args = p.arguments()
    weights, ids = reference.route(p.x, p.rows(), p.num_experts_per_tok)
    ops = torch.ops.smile_kernels
    m, g = p.num_experts_per_tok, p.rank_of_router
    h = torch.randn(*ids.shape, p.s.shape[1])
    x, weight, _, vh, s, u, expert_bias, _ = args
    dy = torch.randn(x.shape[0], weight.shape[0])
    cases = [
        (ops.route, (p.x, p.rows(), m)),
        (ops.linear, (*args, m, g, True)),
        (ops.linear, (*args, m, g, False)),
        (ops.apply, (*args[:7], weights, ids, True)),
        (ops.route_backward, (torch.randn_like(weights), x, p.rows(), weights, ids, [True, False])),
        (ops.apply_backward, (dy, x, weight, vh, s, u, expert_bias, weights, ids, h, [True, False] * 4)),
        (ops.linear_backward, (dy, x, weight, vh, s, u, expert_bias, None, weights, ids, h, g, [True, False] * 4)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, (*arguments, backend))


def test_module_copies_pickles_and_round_trips():
    module = layer()
    x = torch.randn(5, module.in_features)
    other = layer()
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        torch.testing.assert_close(twin(x), module(x), rtol=0, atol=0)
    assert "num_local_experts=5" in repr(module)


def test_singular_values_stay_float32():
    module = layer()
    s = module.s.detach().clone()
    for cast in (module.to(torch.bfloat16), module.half(), copy.deepcopy(module).to(torch.bfloat16)):
        assert cast.weight.dtype in (torch.bfloat16, torch.float16)
        assert torch.equal(cast.s, s)
    double = layer().double()
    assert double.s.dtype == torch.float64
    assert double.to(torch.bfloat16).s.dtype == torch.float32


def test_smile_linear_is_the_named_sum():
    module = layer("all", dtype=torch.float64)
    x = torch.randn(4, module.in_features, dtype=torch.float64)
    w = torch.einsum("td,ngd->tng", x, module.vh[:, : module.rank_of_router]).norm(dim=-1).softmax(-1)
    deltas = [module.u[i] * module.s[i] @ module.vh[i, : module.rank_of_expert] for i in range(3)]
    want = x @ module.weight.T + module.bias
    want = want + sum(w[:, i, None] * (x @ deltas[i].T + module.expert_bias[i]) for i in range(3))
    torch.testing.assert_close(module(x), want)


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
        with pytest.raises((ValueError, RuntimeError), match=r"ids: holds .*; expected 0 to 4, or -1 for no expert"):
            call(p, routing=(weights, wrong), backend=backend)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"routing\[1\]: is torch"):
            call(p, routing=(weights, ids.to(dtype)), backend=backend)


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
    with pytest.raises(ValueError, match=r"^routing_weights: .*routing"):
        call(p, routing_weights=torch.rand(t, 5), routing=(torch.rand(t, 2), torch.zeros(t, 2)))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("num_local_experts", (8, 8, 0, 2, 2, 1)),
        ("rank_of_expert", (8, 4, 2, 5, 2, 1)),
        ("rank_of_expert", (8, 4, 2, 0, 2, 1)),
        ("rank_of_router", (8, 4, 2, 2, 9, 1)),
        ("num_experts_per_tok", (8, 4, 2, 2, 2, 3)),
    ],
)
def test_bad_sizes_are_named(name, args):
    with pytest.raises(ValueError, match=f"^{name}:"):
        sk.SmileLinear(*args)


def test_backend_choice(monkeypatch):
    cpu = "cpu", torch.float32, 4
    assert library.choose_backend("torch", *cpu, True) == "torch"
    with pytest.raises(ValueError, match="backend: 'fast' is unknown"):
        library.choose_backend("fast", *cpu, False)
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run here"):
        library.choose_backend("cuda", *cpu, False)
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "")
    assert library.choose_backend(None, *cpu, True) == ("cpu" if library.why_not("cpu", "cpu") is None else "torch")
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "torch")
    assert library.choose_backend(None, *cpu, False) == "torch"
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cannot run here"):
        call(problem("top-1"))
    assert call(problem("top-1"), backend="torch").shape == (33, 16)
    # Without Triton, a GPU serves by the extension what it takes, and by the composition the rest.
    with monkeypatch.context() as patch:
        patch.setitem(library._MODULES, "triton", ".not_installed")
        patch.setattr(extension, "unavailable", lambda _: None)
        patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
        patch.delenv("SMILE_KERNELS_BACKEND")
        layers = [(torch.bfloat16, 256), (torch.float64, 4), (torch.float32, 257)]
        chosen = [library._choose.__wrapped__(None, "cuda", *layer, True) for layer in layers]
        assert chosen == ["cuda", "torch", "torch"]
        with pytest.raises(RuntimeError, match="'cuda' cannot run here: its kernels take up to 256 experts, not 257"):
            library._choose.__wrapped__("cuda", "cuda", *layers[2], True)
    assert sk.backends("cpu")["torch"] is None
    assert list(sk.backends()) == ["triton", "cuda", "cpu", "torch"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_layers_equal_fusion_bench(data):
    """Against the published module; tokens whose scores nearly tie are left out, since its order there is arbitrary."""
    published = pytest.importorskip("fusion_bench.models.smile_moe.linear_from_hf_config")
    n = data.draw(st.integers(2, 6), "N")
    d, o = data.draw(st.integers(2, 24), "D"), data.draw(st.integers(2, 24), "O")
    r, g = data.draw(st.integers(1, min(d, o)), "r"), data.draw(st.integers(1, d), "g")
    m, tokens = data.draw(st.integers(1, n), "m"), data.draw(st.integers(1, 20), "T")
    bias = data.draw(st.booleans(), "bias")
    config = published.SmileMoEConfig()
    config.num_local_experts, config.num_experts_per_tok, config.rank_of_expert, config.rank_of_router = n, m, r, g
    theirs = published.SmileLinear(config, d, o, bias)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=d**-0.5)
    factors = {
        "vh": torch.stack([e.svh for e in theirs.experts]),
        "s": torch.ones(n, r),
        "u": torch.stack([e.u for e in theirs.experts]),
        "expert_bias": torch.stack([e.bias for e in theirs.experts]) if bias else None,
        "router": theirs.gate.weight.view(n, g, d),
    }
    ours = sk.SmileLinear.from_factors(
        theirs.shared_linear.weight, theirs.shared_linear.bias, factors, rank_of_router=g, num_experts_per_tok=m
    )
    x = torch.randn(tokens, d)
    scores = reference.scores(x, ours.router).sort(-1, descending=True).values
    clear = torch.ones(tokens, dtype=torch.bool) if m == n else scores[:, m - 1] - scores[:, m] > 1e-4
    torch.testing.assert_close(ours(x)[clear], theirs(x)[clear], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x)[clear], theirs(x[None])[0][clear], rtol=1e-4, atol=1e-5)


def test_meta_tensors_give_a_meta_tensor():
    p = problem("top-2")
    meta = [t if t is None else t.to("meta") for t in p.arguments()]
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router}
    y = smile_linear(*meta, **options)
    assert y.device.type == "meta"
    assert y.shape == call(p).shape
