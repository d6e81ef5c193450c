"""The layer as users hold it: copied, cast, compiled, exported, and against the published module."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import smile_kernels as sk
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
