"""Every kernel, forward and backward, against the float64 reference: on the GPU if there is one, else interpreted."""

import functools

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smile_kernels.functional import smile_delta, smile_linear
from smile_kernels.ops import reference
from smile_kernels.ops.triton import backend, configs, launch
from smile_kernels.testing import Problem, assert_close, expectations
from tests.problems import PARTS, check_parts, problems_of_parts, side_by_side

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LINEAR_PATHS, APPLY_PATHS = configs.LINEAR_PATHS, configs.APPLY_PATHS


def call(p: Problem, **options) -> torch.Tensor:
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router, **options}
    return smile_linear(*p.arguments(), backend="triton", **options)


def reference_ids(p: Problem) -> torch.Tensor:
    """The experts that exact routing chooses."""
    return reference.route(p.x.detach().double(), p.rows().detach().double(), p.num_experts_per_tok)[1]


def check(p: Problem, *, backward: bool) -> None:
    """Compare y, and with `backward` every gradient, with the reference; plain PyTorch's own error is the bound."""
    leaves = {name: t.requires_grad_(backward) for name, t in p.tensors().items()}
    y = call(p)
    assert y.dtype == p.x.dtype
    dy = torch.randn(y.shape, device=y.device).to(y.dtype) if backward else None
    expected = expectations(p, reference_ids(p), dy=dy)
    assert_close("y", y.detach(), *expected["y"])
    if backward:
        for name, gradient in zip(leaves, torch.autograd.grad(y, leaves.values(), dy)):
            assert gradient.dtype == leaves[name].dtype
            assert_close(f"d{name}", gradient, *expected[name])


@pytest.mark.parametrize("path", ["one_product", "route_first", "grouped"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("two", torch.float32),
        ("three", torch.bfloat16),
        ("three, one dense", torch.float32),
        ("three, one dense", torch.bfloat16),
    ],
    ids=str,
)
def test_parts_match_reference(path, layout, dtype, device, take):
    take("route_first" if path == "grouped" else path, path if path == "grouped" else "fused")
    sizes, ranks = PARTS[layout]
    problems = problems_of_parts(sizes, ranks, 21, 33, 4, 4, 2, dtype=dtype, device=device)
    layer = functools.partial(smile_linear, backend="triton")
    check_parts(problems, ranks, layer, backward=True)
    shape = 21, len(sizes), 2
    routing = torch.rand(shape, device=device), torch.randint(-1, 4, shape, dtype=torch.int32, device=device)
    check_parts(problems, ranks, layer, backward=path != "one_product", routing=routing)


def test_parts_of_one_rank_take_three_launches(device, take, monkeypatch):
    take("one_product")
    sizes, ranks = PARTS["three"]
    problems = problems_of_parts(sizes, ranks, 5, 33, 4, 4, 2, device=device)
    launched = []
    by_triton = launch.Launch.by_triton
    monkeypatch.setattr(launch.Launch, "by_triton", lambda *args: launched.append(1) or by_triton(*args))
    options = {"num_experts_per_tok": 2, "rank_of_router": 4, "parts": sizes, "backend": "triton"}
    smile_linear(problems[0].x, *side_by_side(problems, ranks).values(), **options)
    assert len(launched) == 3


@pytest.mark.parametrize("path", ["one_product", "grouped"])
@pytest.mark.parametrize("tokens", [0, 1, 21])
def test_delta_onto_outputs_among_others(path, tokens, device, take):
    take("route_first" if path == "grouped" else path, path if path == "grouped" else "fused")
    p = Problem.random(tokens, 33, 40, 4, 6, 3, 2, device=device)
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    into = torch.full((tokens, 49), torch.nan, device=device)
    into[:, 4:-5] = base
    options = {"num_experts_per_tok": 2, "rank_of_router": 3, "backend": "triton", "inplace": True}
    y = smile_delta(into[:, 4:-5], p.x, p.vh, p.s, p.u, p.expert_bias, **options)
    assert_close("y", y, *expectations(p, reference_ids(p))["y"])
    assert into[:, :4].isnan().all()
    assert into[:, -5:].isnan().all(), "outputs of others are written"


def possible(dtype: torch.dtype, device: str) -> list[str]:
    """The paths by which a small layer can be routed."""
    return configs.linear_paths(configs.device_of(torch.zeros(0, device=device).device), dtype, 1, 1, 1, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["decode", "decode_one_launch", *APPLY_PATHS])
def test_forward_by_every_path(path, dtype, device, take):
    if path in LINEAR_PATHS and path not in possible(dtype, device):
        pytest.skip(f"no tiles of {dtype} for {path} on this device")
    take(path) if path in LINEAR_PATHS else take("one_product" if path != "grouped" else "route_first", path)
    check(Problem.random(13, 48, 40, 5, 6, 3, 2, dtype=dtype, device=device), backward=False)


@pytest.mark.parametrize(
    ("tokens", "d", "o", "n", "r", "g", "m", "linear", "apply", "options"),
    [
        pytest.param(1, 16, 16, 1, 1, 1, 1, "decode", "fused", {}, id="one-of-everything"),
        pytest.param(16, 33, 50, 3, 5, 9, 3, "decode_one_launch", "fused", {}, id="all-experts"),
        pytest.param(37, 40, 33, 4, 20, 24, 1, "one_product", "fused", {}, id="router-rank-above-expert-rank"),
        pytest.param(19, 35, 17, 3, 7, 2, 2, "route_first", "fused", {"router": True}, id="separate-router"),
        pytest.param(33, 17, 21, 3, 70, 3, 1, "one_product", "delta", {"bias": False}, id="rank-beyond-one-block"),
        pytest.param(20, 34, 40, 66, 2, 2, 3, "one_product", "tma", {"expert_bias": False}, id="many-experts"),
        pytest.param(40, 33, 70, 6, 40, 3, 2, "route_first", "grouped", {"bias": False}, id="grouped-odd"),
        pytest.param(5, 16, 16, 256, 1, 1, 1, "route_first", "grouped", {}, id="grouped-more-experts-than-tokens"),
    ],
)
def test_forward_of_odd_shapes(tokens, d, o, n, r, g, m, linear, apply, options, device, take):
    take(linear, apply)
    check(Problem.random(tokens, d, o, n, r, g, m, dtype=torch.bfloat16, device=device, **options), backward=False)


@pytest.mark.parametrize("seed", range(2))
def test_many_experts_are_not_rounded_as_the_base_product_is(seed, device, take):
    take("route_first", "fused")
    check(Problem.random(1, 33, 8, 64, 33, 33, 47, router=True, seed=seed, device=device), backward=False)


@pytest.mark.parametrize("apply", ["fused", "grouped"])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        pytest.param((19, 40, 36, 4, 6, 3, 2), torch.float32, {}, id="tied-float32"),
        pytest.param((18, 33, 20, 5, 3, 7, 3), torch.float32, {}, id="router-rank-above-expert-rank"),
        pytest.param((19, 40, 36, 4, 6, 3, 2), torch.bfloat16, {"router": True}, id="separate-bfloat16"),
        pytest.param((7, 17, 21, 3, 5, 9, 1), torch.float16, {}, id="top-1-float16"),
        pytest.param((17, 16, 35, 3, 70, 4, 3), torch.bfloat16, {"expert_bias": False, "bias": False}, id="large-rank"),
        pytest.param((5, 16, 17, 2, 515, 16, 1), torch.float16, {}, id="rank-above-features"),
        pytest.param((4, 16, 16, 256, 1, 1, 2), torch.float32, {}, id="256-experts"),
        pytest.param((2, 16, 17, 20, 2, 16, 20), torch.float16, {"router": True}, id="all-of-20-experts"),
    ],
)
def test_backward(shape, dtype, options, apply, device, take):
    take("route_first" if apply == "grouped" else "one_product", apply)
    check(Problem.random(*shape, dtype=dtype, device=device, **options), backward=True)


@pytest.mark.parametrize("apply", ["fused", "grouped"])
@pytest.mark.parametrize(
    ("needed", "router"),
    [
        *((name, True) for name in ("x", "weight", "bias", "vh", "s", "u", "expert_bias", "router")),
        *((name, False) for name in ("x", "vh", "s", "u")),
    ],
)
def test_each_gradient_alone_equals_that_of_all(needed, router, apply, device, take):
    take("route_first", apply)
    p = Problem.random(9, 16, 18, 3, 4, 2, 2, router=router, device=device)
    dy = torch.randn(9, 18, device=device)

    def gradients(names):
        leaves = {name: t.detach().requires_grad_(name in names) for name, t in p.tensors().items()}
        call(Problem(**{**vars(p), **leaves})).backward(dy)
        return {name: t.grad for name, t in leaves.items()}

    alone, together = gradients([needed]), gradients(list(p.tensors()))
    assert torch.equal(alone.pop(needed), together[needed])
    assert set(alone.values()) == {None}


@pytest.mark.parametrize("path", ["fused", "delta", "grouped"])
def test_given_routing_with_duplicates_without_experts_and_gradient_of_the_weights(path, device, take):
    take(apply=path)
    p = Problem.random(18, 20, 24, 5, 4, 3, 2, device=device)
    weights = torch.rand(18, 3, device=device, requires_grad=True)
    ids = torch.randint(5, (18, 3), device=device)
    ids[0] = ids[0, 0]
    ids[1], ids[2, 0], ids[3, 2] = -1, -1, -1
    p.u.requires_grad_()
    y = call(p, routing=(weights, ids))
    dy = torch.randn_like(y)
    expected = expectations(p, ids, weights=weights, dy=dy)
    assert_close("y", y.detach(), *expected["y"])
    dweights, du = torch.autograd.grad(y, [weights, p.u], dy)
    assert_close("dweights", dweights, *expected["weights"])
    assert_close("du", du, *expected["u"])


def test_a_slot_without_an_expert_reads_no_product(device, take):
    take(apply="fused")
    p = Problem.random(6, 20, 24, 5, 4, 3, device=device)
    weights, ids = torch.rand(6, 2, device=device), torch.randint(5, (6, 2), dtype=torch.int32, device=device)
    ids[0, 0], ids[1], ids[4, 1] = -1, -1, 5
    _, h = backend.apply(*p.arguments()[:7], weights, ids, True)
    none = (ids < 0) | (ids == 5)
    assert (h[none] == 0).all()
    assert (h[~none] != 0).all()


def test_given_routing_that_many_tokens_share(device, take):
    take(apply="fused")
    p = Problem.random(6, 20, 24, 5, 4, 3, device=device)
    weights, ids = torch.tensor([[0.25, 0.75]], device=device), torch.tensor([[4, 1]], device=device)
    shared = call(p, routing=(weights.expand(6, 2), ids.expand(6, 2)))
    assert torch.equal(shared, call(p, routing=(weights.repeat(6, 1), ids.repeat(6, 1))))


@pytest.mark.parametrize("linear", LINEAR_PATHS)
def test_ties_go_to_the_lower_index(linear, device, take):
    take(linear)
    p = Problem.random(6, 16, 16, 6, 4, 2, 3, dtype=torch.bfloat16, device=device)
    p.vh[:] = p.vh[:1]
    p.vh[4] *= 2
    arguments = *p.arguments(), p.num_experts_per_tok, p.rank_of_router, False
    _, weights, ids, _ = backend.linear(*arguments)
    assert ids.tolist() == [[4, 0, 1]] * 6
    assert torch.equal(weights[:, 1], weights[:, 2])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_scores_of_any_magnitude_route_as_the_reference_says(device):
    """Squares that overflow or vanish, infinities and NaN: tokens are independent, weights always finite."""
    x = torch.randn(9, 12, device=device)
    router = torch.randn(5, 4, 12, device=device) * 0.3
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3], x[4, 2], x[5, 7] = 0, float("inf"), float("nan")
    x[6] *= 1e19
    weights, ids = backend.route(x, router, 2)
    assert weights.isfinite().all()
    finite = [0, 1, 2, 3, 6, 7, 8]
    want_weights, want_ids = reference.select(reference.scores(x[finite].double(), router.double()), 2)
    assert torch.equal(ids[finite], want_ids)
    torch.testing.assert_close(weights[finite], want_weights.float(), rtol=1e-5, atol=1e-6)
    assert ((ids[[4, 5]] >= 0) & (ids[[4, 5]] < 5)).all()
    assert (ids[5] == torch.tensor([0, 1], device=device)).all()


@pytest.mark.parametrize(("n", "g", "m"), [(256, 1, 256), (2, 256, 1), (200, 33, 4), (1, 3, 1)])
def test_route_of_extreme_sizes(n, g, m, device):
    x, router = torch.randn(3, 16, device=device), torch.randn(n, g, 16, device=device) * 0.1
    weights, ids = backend.route(x, router, m)
    want_weights, want_ids = reference.route(x.double(), router.double(), m)
    torch.testing.assert_close(weights, want_weights.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ids, want_ids)
    if m == 1:
        assert (weights == 1).all()


@pytest.mark.parametrize("apply", APPLY_PATHS)
def test_inputs_of_any_strides(apply, device, take):
    take("route_first" if apply == "grouped" else "one_product", apply)
    p = Problem.random(10, 48, 20, 3, 4, 5, 2, device=device)
    want = call(p)
    strided = {name: t.mT.contiguous().mT for name, t in p.tensors().items() if t.dim() >= 2}
    assert not any(t.is_contiguous() for t in strided.values())
    assert torch.equal(call(Problem(**{**vars(p), **strided})), want)
    wide = torch.randn(10, 2, 48, device=device)
    wide[:, 1] = p.x
    assert torch.equal(call(Problem(**{**vars(p), "x": wide[:, 1]})), want)


def test_gradient_that_is_a_broadcast_number(device, take):
    take("one_product", "fused")
    p = Problem.random(6, 16, 18, 3, 4, 2, device=device)
    p.u.requires_grad_()
    a = torch.autograd.grad(call(p).sum(), p.u)[0]
    b = torch.autograd.grad(call(p), p.u, torch.ones(6, 18, device=device))[0]
    assert torch.equal(a, b)


def test_no_tokens(device):
    p = Problem.random(0, 16, 18, 3, 4, 2, 2, router=True, device=device)
    leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
    y = call(p)
    assert y.shape == (0, 18)
    for name, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves.values())):
        assert torch.equal(gradient, torch.zeros_like(leaves[name])), name


@pytest.mark.parametrize(
    ("linear", "apply"),
    [
        ("decode", "fused"),
        ("decode_one_launch", "fused"),
        ("one_product", "fused"),
        ("one_product", "tma"),
        ("route_first", "grouped"),
    ],
)
def test_offsets_beyond_32_bits(linear, apply, device, take):
    """Over 2^31 elements from the first row of x to the last; memory is reserved, and only the rows are touched."""
    if linear not in possible(torch.float16, device):
        pytest.skip(f"no tiles of float16 for {linear} on this device")
    take(linear, apply)
    p = Problem.random(13, 16, 18, 2, 4, 2, dtype=torch.float16, device=device)
    gap = 200_000_000
    storage = torch.UntypedStorage(2 * (12 * gap + 16), device=device)
    rows = p.x.new_zeros(0).set_(storage, 0, (13, 16), (gap, 1))
    rows.copy_(p.x)
    p.vh.requires_grad_(linear not in ("decode", "decode_one_launch"))
    far, near = call(Problem(**{**vars(p), "x": rows})), call(p)
    assert torch.equal(far, near)
    if near.requires_grad:
        dy = torch.randn_like(near)
        assert torch.equal(*(torch.autograd.grad(y, p.vh, dy)[0] for y in (far, near)))


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert backend.why_not("cuda", torch.float32, 1, False) == "it needs Triton 3.6 or newer, not 3.5.1"


def test_float64_is_refused(device):
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run here: it takes float32, .* not float64"):
        call(Problem.random(2, 16, 16, 2, 2, 2, dtype=torch.float64, device=device))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (20, 40, 40, 6, 20, 12))),
    m=st.integers(1, 3),
    linear=st.sampled_from(LINEAR_PATHS),
    apply=st.sampled_from(APPLY_PATHS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_by_any_path(shape, m, linear, apply, dtype, seed, device, take):
    tokens, d, o, n, r, g = shape
    if linear not in possible(dtype, device):
        linear = "one_product"
    if linear in ("decode", "decode_one_launch"):
        tokens, n = min(tokens, 16), min(n, 4)
    take("route_first" if apply == "grouped" else linear, apply)
    p = Problem.random(tokens, d, o, n, r, min(g, d), min(m, n), dtype=dtype, seed=seed, device=device)
    check(p, backward=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", configs.TILES)
def test_every_kernel_of_a_chosen_path_has_tiles(family, dtype):
    device = configs.Device(family, family, 132, pdl=False, tma=False)
    for tokens in (1, 16, 64, 2048):
        path = configs.linear_path(device, dtype, tokens, 4096, 4096, 8, 32, 16, 32, 1, False)
        block = configs.group_block(tokens, 8, device, dtype)
        kernels = {"shrink": tokens, "expand": tokens, "gather": block, "scatter": block, "outer": 32}
        for kernel, rows in [*kernels.items(), *([("decode", tokens)] if path == "decode" else [])]:
            assert configs.tile(kernel, device, dtype, rows, 4096, 4096)


def test_heuristics_choose_what_can_run():
    device = configs.Device("some GPU", "sm90", 132, pdl=True, tma=True)
    half = torch.bfloat16
    assert configs.linear_path(device, half, 1, 4096, 4096, 8, 32, 16, 32, 1, False) == "decode"
    assert configs.linear_path(device, half, 1, 4096, 4096, 8, 32, 16, 32, 1, True) == "one_product"
    assert configs.linear_path(device, torch.float32, 1, 4096, 4096, 8, 32, 16, 32, 1, False) == "one_product"
    assert configs.linear_path(device, half, 17, 4096, 4096, 8, 32, 16, 32, 1, False) == "one_product"
    assert configs.linear_path(device, half, 4, 4096, 4096, 64, 64, 8, 64, 1, False) == "route_first"
    assert configs.apply_path(device, half, 2048, 4096, 4096, 8, 32, 1) == "delta"
    assert configs.apply_path(device, half, 16, 4096, 4096, 8, 128, 1) == "fused"
    for tokens in (32, 64, 128, 256):  # the tiles of the fused product are limited by the cache
        assert configs.apply_path(device, half, tokens, 4096, 4096, 8, 32, 1) == "delta"
    assert configs.apply_path(device, half, 64, 768, 768, 8, 32, 1) == "fused"
    assert configs.apply_path(device, torch.float32, 64, 4096, 4096, 8, 32, 1) == "fused"
    assert configs.apply_path(device, half, 2048, 4096, 4096, 64, 64, 1) == "grouped"
    assert configs.apply_path(device, half, 2048, 4096, 4096, 3, 512, 1) == "grouped"
    assert configs.apply_path(device, half, 2048, 4096, 4096, 64, 64, 64) == "delta"
    assert configs.apply_path(device, half, 2048, 768, 768, 8, 128, 1) == "delta"
    assert configs.apply_path(device, torch.float32, 2048, 768, 768, 8, 128, 1) == "delta"


def test_compiled_without_graph_breaks(device, take):
    take("one_product", "fused")
    p = Problem.random(5, 16, 18, 3, 4, 2, 2, device=device)
    p.u.requires_grad_()
    _, *parameters = p.arguments()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return smile_linear(x, *parameters, num_experts_per_tok=2, rank_of_router=2, backend="triton")

    y = compiled(p.x)
    assert torch.equal(y, call(p))
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, p.u, dy)[0] for out in (y, call(p))))
