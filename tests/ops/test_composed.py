"""The torch backend, forward and backward, against the float64 reference."""

import pytest
import torch

from smile_kernels.functional import route
from smile_kernels.ops import composed, reference
from smile_kernels.testing import Problem, assert_close, expectations
from tests.problems import SHAPES, call, problem

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["own tokens", "every token", "every expert"])
def way(request, monkeypatch):
    """Each way in which the composition computes experts on a CPU, for problems of any size."""
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
    """The path for bfloat16 from a few tokens on, in wide layers."""
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
    """Runs as in sequences under routing policies: an expert may have several; a change of one slot ends a run."""
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
    """Test the padded layout of other devices on the CPU."""
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
    """Its weight is ignored and has no gradient, for some slots, for all of a token, and for all of a run of tokens."""
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
