"""The public functions: shapes, dtypes, transforms, and bad input refused by name."""

import pytest
import torch

from smile_kernels.functional import route, router_scores, select_experts, smile_linear
from smile_kernels.ops import reference
from smile_kernels.testing import Problem
from tests.problems import ON_CPU, call, problem


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


def test_meta_tensors_give_a_meta_tensor():
    p = problem("top-2")
    meta = [t if t is None else t.to("meta") for t in p.arguments()]
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router}
    y = smile_linear(*meta, **options)
    assert y.device.type == "meta"
    assert y.shape == call(p).shape
