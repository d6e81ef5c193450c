"""The layer in use: copied, cast, compiled, exported, and compared with the published module."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import smile_kernels as sk
from smile_kernels.integrations.quantization import split_base
from smile_kernels.ops import reference
from tests.problems import SHAPES


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


def test_inference_gives_the_errors_of_training():
    module, d = layer(), layer().in_features
    x, n, m = torch.randn(2, 3, d), module.num_local_experts, module.num_experts_per_tok
    weights, ids = torch.rand(2, 3, m), torch.zeros(2, 3, m, dtype=torch.int32)
    without = copy.deepcopy(module)
    without.num_experts_per_tok = n + 1
    wrong = copy.deepcopy(module)
    wrong.vh = torch.nn.Parameter(wrong.vh[:, :-1, :-1].detach())
    mixed = copy.deepcopy(module)
    mixed.u = torch.nn.Parameter(mixed.u.detach().half())
    calls = {
        "a list": (module, [1.0]),
        "no dimension": (module, torch.tensor(1.0)),
        "columns": (module, x[..., 1:]),
        "dtype": (module, x.half()),
        "integers": (module, x.long()),
        "sparse": (module, x.to_sparse()),
        "nested": (module, torch.nested.nested_tensor([x[0], x[1, :2]])),
        "mkldnn": (module, x.to_mkldnn()),
        "flat routing": (module, x, (weights.flatten(0, 1), ids.flatten(0, 1))),
        "flat routing without experts": (module, x, (weights.flatten(0, 1)[..., :0], ids.flatten(0, 1)[..., :0])),
        "no experts, weights of another shape": (module, x, (weights[0, 0, :1], ids[..., :0])),
        "no experts, ids of floats": (module, x, (weights[..., :0], ids[..., :0].float())),
        "no experts, complex weights": (module, x, (weights[..., :0].to(torch.complex64), ids[..., :0])),
        "one weight": (module, x, (weights[..., :1], ids)),
        "ids of floats": (module, x, (weights, ids.float())),
        "an id out of range": (module, x, (weights, ids + n)),
        "one tensor": (module, x, weights),
        "a number": (module, x, 5),
        "a dict": (module, x, {"weights": weights, "ids": ids}),
        "three tensors": (module, x, (weights, ids, ids)),
        "numbers": (module, x, (weights, 5)),
        "ids without a dimension": (module, x[0, 0], (weights[0, 0, 0], ids[0, 0, 0])),
        "more experts than there are": (without, x),
        "vh": (wrong, x),
        "u": (mixed, x),
    }
    for name, (of, *arguments) in calls.items():
        messages = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(sk.SmileError) as raised:
                of(*arguments)
            messages.append(str(raised.value))
        assert messages[0] == messages[1], name
    longs = module(x, routing=(weights.double(), ids.long()))
    with torch.no_grad():
        torch.testing.assert_close(module(x, routing=(weights.double(), ids.long())), longs)
        torch.testing.assert_close(module(x, routing=(weights, ids)), longs)


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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_layers_equal_fusion_bench(data):
    """Compared with the published module, except for tokens with near-ties, whose order is arbitrary there."""
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


def projections(dense: bool = True, **options) -> list[torch.nn.Linear]:
    """Layers with the same x: of several sizes and ranks, and one without experts."""
    sizes = {"in_features": 23, "num_local_experts": 4, "rank_of_router": 3, "num_experts_per_tok": 2, **options}
    layers = [
        sk.SmileLinear(out_features=70, rank_of_expert=5, **sizes),
        torch.nn.Linear(23, 9, dtype=options.get("dtype")),
        sk.SmileLinear(out_features=8, rank_of_expert=2, **{**sizes, "bias": False}),
        sk.SmileLinear(out_features=33, rank_of_expert=1, **{**sizes, "expert_bias": False}),
    ]
    return layers if dense else [layers[0], *layers[2:]]


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("options", [{}, {"router": True}, {"router_prior": True, "bias": False}], ids=str)
def test_a_merged_layer_is_its_parts_side_by_side(options, tokens):
    layers = projections(dtype=torch.float64, **options)
    merged = sk.SmileLinear.merge(layers)
    x = torch.randn(2, tokens, 23, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), torch.cat([layer(x) for layer in layers], -1))
    want, got = torch.cat([layer(x) for layer in layers], -1), merged(x)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    names = [(i, name) for i, layer in enumerate(layers) for name, _ in layer.named_parameters()]
    own = torch.autograd.grad(want, [x, *(p for layer in layers for p in layer.parameters())], dy)
    whole = dict(merged.named_parameters())
    gradients = torch.autograd.grad(got, [x, *whole.values()], dy)
    torch.testing.assert_close(gradients[0], own[0])
    pieces = {name: list(merged._pieces(name, g)) for name, g in zip(whole, gradients[1:])}
    for (i, name), gradient in zip(names, own[1:]):
        torch.testing.assert_close(pieces[name][i], gradient)


@pytest.mark.parametrize("router", [False, True], ids=["tied", "own-router"])
def test_split_is_the_inverse_of_merge(router):
    layers = projections(router=router, router_prior=True)
    layers[2].router_prior.copy_(torch.randn(4))
    for layer in (layers[0], *layers[2:]):
        layer.expert_names = ("a", "b", "c", "d")
    parts = sk.SmileLinear.merge(layers).split()
    assert parts[2].expert_names == ("a", "b", "c", "d")
    assert [type(part) for part in parts] == [type(layer) for layer in layers]
    for part, layer in zip(parts, layers):
        got, want = part.state_dict(), layer.state_dict()
        assert all(torch.equal(got[name], t) for name, t in want.items())
        assert not any(t.any() for name, t in got.items() if name not in want), "a bias that was none is not 0"
    x = torch.randn(5, 23)
    again = sk.SmileLinear.merge(parts)
    assert torch.equal(again(x), sk.SmileLinear.merge(layers)(x))
    with pytest.raises(ValueError, match=r"parts: is None; expected a layer made by SmileLinear\.merge"):
        layers[0].split()


def test_a_merged_layer_is_copied_cast_stored_and_compiled():
    merged = sk.SmileLinear.merge(projections()).requires_grad_(False)
    sizes = {"parts": merged.parts, "rank_of_parts": merged.rank_of_parts}
    other = sk.SmileLinear(23, merged.out_features, 4, 5, 3, 2, **sizes)
    other.load_state_dict(merged.state_dict())
    other.requires_grad_(False)
    x = torch.randn(6, 23)
    for twin in (other, copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(twin(x), merged(x))
    assert "parts=(70, 9, 8, 33), rank_of_parts=(5, 0, 2, 1)" in repr(merged)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(merged, fullgraph=True, backend="aot_eager")(x), merged(x))
    low = merged.to(torch.bfloat16)
    assert low.s.dtype == torch.float32
    assert (low(x.bfloat16()).float() - other(x)).abs().mean() < 0.02 * other(x).abs().mean()


class Attention(torch.nn.Module):
    """Projections of one x, separate or merged."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        x = torch.nn.functional.normalize(x, dim=-1)
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize(
    "policy",
    [
        sk.RoutingPolicy("causal", accumulate=True),
        sk.RoutingPolicy("sequence", num_experts_per_tok=1),
        sk.RoutingPolicy("token", calibrated=True),
    ],
    ids=str,
)
def test_the_parts_of_a_merged_layer_keep_their_routing_policy(policy):
    model = Attention(projections(router_prior=True))
    for layer in (model.layers[0], *model.layers[2:]):
        layer.router_prior.copy_(torch.randn(4))
    x = torch.randn(2, 7, 23)
    published = model(x)
    sk.set_routing(model, policy)
    want = model(x)
    assert not torch.allclose(want, published), "this policy chooses as the published routing does: no test"
    layers = list(model.layers)
    model.layers = torch.nn.ModuleList([sk.SmileLinear.merge(layers)])
    torch.testing.assert_close(model(x), want)
    parts = model.layers[0].split()
    model.layers = torch.nn.ModuleList(parts)
    torch.testing.assert_close(model(x), want)
    assert [getattr(part, "router_policy", None) for part in parts] == [
        getattr(layer, "router_policy", None) for layer in layers
    ]


def test_what_cannot_be_merged_is_named():
    merge, layer = sk.SmileLinear.merge, projections(dense=False)[0]

    def other(**options):
        sizes = {"in_features": 23, "out_features": 8, "num_local_experts": 4, "rank_of_expert": 2}
        return sk.SmileLinear(**{**sizes, "rank_of_router": 3, "num_experts_per_tok": 2, **options})

    class Own(sk.SmileLinear):
        pass

    with_hook, frozen = other(), other()
    with_hook.register_forward_hook(lambda *_: None)
    frozen.u.requires_grad_(False)
    for layers, message in (
        ([], "layers: contain no SmileLinear"),
        ([torch.nn.Linear(23, 4)], "layers: contain no SmileLinear"),
        ([layer, Own(23, 8, 4, 2, 3, 2)], "layers: number 1 is a Own; expected SmileLinear or nn.Linear"),
        ([merge([layer])], "layers: number 0 is a merged layer"),
        ([layer, with_hook], "layers: number 1 has hooks"),
        ([layer, other(in_features=22)], "layers: differ in in_features, 23 and 22"),
        ([layer, other(num_local_experts=3)], "layers: differ in num_local_experts, 4 and 3"),
        ([layer, other(rank_of_router=2)], "layers: differ in rank_of_router, 3 and 2"),
        ([layer, other(num_experts_per_tok=1)], "layers: differ in num_experts_per_tok, 2 and 1"),
        ([layer, other(router=True)], "layers: differ in having a router, False and True"),
        ([layer, other(router_prior=True)], "layers: differ in having a router_prior, False and True"),
        ([layer, other(dtype=torch.float64)], "layers: differ in weight.dtype, torch.float32 and torch.float64"),
        ([layer, frozen], "layers: differ in u.requires_grad, True and False"),
    ):
        with pytest.raises(sk.SmileError, match=message):
            merge(layers)
    model = torch.nn.Sequential(merge([layer]))
    for use in (lambda: sk.set_routing(model, sk.RoutingPolicy("sequence")), lambda: sk.calibrate(model)):
        with pytest.raises(
            sk.SmileError, match=r"model: 0 is a merged layer; expected the layers of its parts \(split\)"
        ):
            use()


def test_models_are_walked_a_number_of_times_that_does_not_depend_on_their_layers(monkeypatch, tmp_path):
    walk, visited = nn.Module.named_modules, 0

    def counted(self, *args, **kwargs):
        nonlocal visited
        visited += 1
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)

    def visits(layers: int) -> list[int]:
        base, tuned = (nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))) for _ in range(2))
        model, folder, counts = None, tmp_path / str(layers), []

        def fuse() -> None:
            nonlocal model
            model, _ = sk.upscale(base, [tuned], rank_of_expert=2, rank_of_router=2, progress=False)

        for step in (
            fuse,
            lambda: sk.save_pretrained(model, folder),
            lambda: sk.load_pretrained(folder, base),
            lambda: split_base(model),
        ):
            before = visited
            step()
            counts.append(visited - before)
        return counts

    for few, many in zip(visits(20), visits(80)):
        assert many < 5 * few
