"""Truncated SVD compared with the float64 SVD, for spectra of weight differences; SMILE factors of a layer."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from smile_kernels.svd import decompose_linear, lora_svd, truncated_svd


def spectrum(name: str, n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "fast": 0.7**i,
        "very-fast": 0.5**i,
        "decaying": (-i / 10).exp(),
        "power-1": i**-1,
        "power-0.5": i**-0.5,
        "power-0.2": i**-0.2,
        "equal": i**0,
        "linear": 1 - 0.5 * i / n,
        "step": torch.where(i <= 100, 1.0, 0.1).double(),
        "step-8": torch.where(i <= 8, 1.0, 0.01).double(),
        "rank-8": torch.where(i <= 8, 1 / i, 0.0),
        "rank-40": torch.where(i <= 40, 1 / i, 0.0),
    }[name]


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def from_spectrum(s: Tensor, o: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ((orthonormal(o, len(s)) * s) @ orthonormal(d, len(s)).T).to(dtype)


def merged_lora(o: int, d: int, dtype: torch.dtype, size: float = 0.1, rank: int = 8) -> tuple[Tensor, Tensor]:
    """A weight, and the same with a low-rank update of `size` times its norm added and rounded to its dtype."""
    weight = (torch.randn(o, d) / d**0.5).to(dtype)
    update = torch.randn(o, rank) @ torch.randn(rank, d)
    update *= size * weight.float().norm() / update.norm()
    return weight, (weight.float() + update).to(dtype)


def matrix(name: str, o: int, d: int) -> Tensor:
    if name == "gaussian":
        return torch.randn(o, d)
    if name == "lora-bf16":
        weight, expert = merged_lora(o, d, torch.bfloat16)
        return expert.float() - weight.float()
    return from_spectrum(spectrum(name, min(o, d)), o, d)


SPECTRA = (
    "fast very-fast decaying power-1 power-0.5 power-0.2 equal linear step step-8 rank-8 rank-40 gaussian lora-bf16"
)


def assert_optimal(a: Tensor, result, rank: int, g: int) -> None:
    """The documented properties of `truncated_svd`, compared with the float64 SVD of the same bits."""
    wide = a.double()
    try:
        _, s, vh = torch.linalg.svd(wide, full_matrices=False)
    except torch.linalg.LinAlgError:  # LAPACK's divide and conquer, which torch calls, fails for equal singular values
        _, s, vh = map(torch.from_numpy, scipy.linalg.svd(wide, full_matrices=False, lapack_driver="gesvd"))
    r, k, total = len(result.s), len(result.vh), s.norm().item()
    assert (r, k) == (rank, max(rank, g))
    assert result.u.shape == (a.shape[0], r)
    assert result.vh.shape == (k, a.shape[1])
    error = (wide - (result.u.double() * result.s.double()) @ result.vh[:r].double()).norm().item()
    optimal = s[r:].norm().item()
    assert error <= (1 + 1e-3) * optimal + 1e-5 * total

    certificate = result.certificate
    assert certificate.rank == r
    assert certificate.error == pytest.approx(error / total, abs=1e-6)
    assert certificate.energy == pytest.approx(1 - (error / total) ** 2, abs=1e-6)
    assert (result.s.diff() <= 0).all()
    live = certificate.directions
    norms = torch.tensor([1.0] * live + [0.0] * (k - live), dtype=torch.float64)
    torch.testing.assert_close(result.vh.double().norm(dim=1), norms, atol=1e-6, rtol=0)
    assert not result.s[live:].any()
    assert not result.u[:, live:].any()
    largest = result.vh.gather(1, result.vh.abs().argmax(dim=1, keepdim=True))
    assert (largest[:live] > 0).all()

    g = min(g, live)
    epsilon = torch.finfo(result.s.dtype).eps
    if g and (g == len(s) or s[g - 1] - s[g] > 32 * epsilon * s[0]):  # otherwise the router's subspace is not unique
        rows = result.vh[:g].double().T
        sine = torch.linalg.matrix_norm(rows - vh[:g].T @ (vh[:g] @ rows), 2).item()
        assert sine <= 1e-3 or not certificate.router_converged
    # Unique or not, router rows are singular directions: a maps them to g orthogonal ones of the g largest sizes.
    if g:
        image = wide @ result.vh[:g].double().T
        assert ((image.norm(dim=0) - s[:g]).abs() <= 1e-4 * s[0]).all()


@pytest.mark.parametrize("rank_and_router", [(32, 16), (8, 16), (100, 4)], ids=str)
@pytest.mark.parametrize("shape", [(600, 400), (300, 520)], ids=str)
@pytest.mark.parametrize("name", SPECTRA.split())
def test_error_router_rows_and_certificate_on_every_spectrum(name, shape, rank_and_router):
    rank, g = rank_and_router
    a = matrix(name, *shape)
    result = truncated_svd(a, rank, rank_of_router=g)
    assert_optimal(a, result, rank, g)
    assert result.certificate.router_converged


@pytest.mark.parametrize("name", ["decaying", "power-1", "power-0.5", "power-0.2", "rank-8", "gaussian"])
def test_large_matrices_take_the_fast_route(name):
    a = matrix(name, 1024, 900)
    result = truncated_svd(a, 32, rank_of_router=16)
    assert result.certificate.method == "krylov"
    assert result.certificate.router_converged
    assert_optimal(a, result, 32, 16)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.data())
def test_small_shapes(o, d, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    rank, g = data.draw(st.integers(1, min(o, d))), data.draw(st.integers(0, min(o, d)))
    a = from_spectrum(torch.rand(min(o, d), dtype=torch.float64) ** data.draw(st.integers(0, 12)), o, d, dtype)
    assume(a.any())
    result = truncated_svd(a, rank, rank_of_router=g)
    assert result.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_optimal(a, result, rank, g)


@settings(max_examples=25, deadline=None)
@given(st.integers(260, 420), st.integers(260, 420), st.data())
def test_drawn_spectra(o, d, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    n = min(o, d)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    power, decay = data.draw(st.floats(0, 3)), data.draw(st.floats(1, 1e4))
    s = i**-power * (-i / decay).exp()
    repeats = data.draw(st.integers(1, 40))  # equal singular values, in runs longer than a block
    s = s[::repeats].repeat_interleave(repeats)[:n]
    rank, g = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 24))
    a = from_spectrum(s, o, d, data.draw(st.sampled_from([torch.float32, torch.float64])))
    assert_optimal(a, truncated_svd(a, rank, rank_of_router=g), rank, g)


@pytest.mark.parametrize("rank", [32, 100])
@pytest.mark.parametrize(
    "name", ["100 equal", "40 and 40 equal", "identity", "hadamard", "ones", "one entry", "outlier"]
)
def test_structures_a_random_block_could_miss(name, rank):
    d = torch.full((512,), 0.01)
    d[:100] = 1
    if name == "40 and 40 equal":
        d[40:80], d[80:100] = 0.5, 0.01
    a = torch.diag(d)
    if name == "identity":
        a = torch.eye(512)
    if name == "hadamard":
        a = torch.ones(1, 1)
        while len(a) < 512:
            a = torch.cat([torch.cat([a, a], 1), torch.cat([a, -a], 1)])
    if name == "ones":
        a = torch.ones(512, 300)
    if name == "one entry":
        a = torch.zeros(512, 300)
        a[3, 5] = -1e-20
    if name == "outlier":
        a = torch.randn(512, 300)
        a[:, 7] *= 1e4
    assert_optimal(a, truncated_svd(a, rank, rank_of_router=8), rank, 8)


@pytest.mark.parametrize("shape", [(40, 30), (400, 300)], ids=str)
@pytest.mark.parametrize("name", ["decaying", "power-0.5", "gaussian", "rank-8"])
@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_fraction_is_the_smallest_rank_that_holds_it(name, shape, share):
    a = matrix(name, *shape)
    result = truncated_svd(a, share, rank_of_router=4)
    energy = torch.linalg.svdvals(a.double()).square()
    held = energy.cumsum(0) / energy.sum()
    rank = int((held < share).sum()) + 1
    assert_optimal(a, result, rank, 4)
    assert result.certificate.energy >= share - 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (64, 40), (300, 400)], ids=str)
def test_full_rank_is_exact(shape, dtype):
    a = torch.randn(shape).to(dtype)
    result = truncated_svd(a, -1)
    assert len(result.s) == min(shape)
    u, s, vh = torch.linalg.svd(a.to(result.s.dtype), full_matrices=False)
    plain = ((u * s) @ vh - a).norm()
    error = ((result.u * result.s) @ result.vh - a).norm()
    assert error <= 2 * plain + torch.finfo(s.dtype).eps * s.norm()
    assert result.certificate.energy == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(60, 90), (400, 300)], ids=str)
def test_directions_at_rounding_level_are_null(shape, dtype):
    weight, expert = merged_lora(*shape, dtype)
    factors, [certificate] = decompose_linear(weight, None, [expert], [None], rank_of_expert=12, rank_of_router=16)
    assert certificate.directions == 8
    assert factors["vh"][0, :8].any(dim=1).all()
    assert not factors["vh"][0, 8:].any()
    assert not factors["s"][0, 8:].any()
    assert not factors["u"][0, :, 8:].any()
    # A router with no more rows than the rank of the update does not change the expert's other directions.
    _, [certificate] = decompose_linear(weight, None, [expert], [None], rank_of_expert=12, rank_of_router=8)
    assert certificate.directions == (8 if dtype == torch.float32 else 12)


def test_an_update_of_single_steps_is_kept():
    weight = (torch.randn(60, 80) / 9).bfloat16()
    expert = torch.where(torch.rand(60, 80) < 0.05, weight * (1 + 2**-7), weight)
    _, [certificate] = decompose_linear(weight, None, [expert], [None], rank_of_expert=8, rank_of_router=4)
    assert certificate.directions == 8
    _, [whole] = decompose_linear(weight, None, [expert], [None], rank_of_expert=-1, rank_of_router=4)
    assert whole.error < 1e-5


def test_noise_floor_below_which_nothing_is_kept():
    a = from_spectrum(spectrum("power-1", 300), 400, 300)
    assert truncated_svd(a, 4, rank_of_router=16, noise_floor=0.105).certificate.directions == 9
    assert truncated_svd(a, 20, rank_of_router=9, noise_floor=0.105).certificate.directions == 20
    nothing = truncated_svd(a, 4, rank_of_router=16, noise_floor=2.0)
    assert nothing.certificate.directions == 0
    assert nothing.certificate.error == pytest.approx(1)
    assert not nothing.vh.any()


@pytest.mark.parametrize("rank", [3, -1, 0.5])
def test_zero_matrix(rank):
    result = truncated_svd(torch.zeros(7, 5, dtype=torch.bfloat16), rank, rank_of_router=4)
    r = 3 if rank == 3 else 1
    assert [tuple(t.shape) for t in (result.u, result.s, result.vh)] == [(7, r), (r,), (4, 5)]
    assert not any(t.any() for t in (result.u, result.s, result.vh))
    assert (result.certificate.directions, result.certificate.energy, result.certificate.error) == (0, 1.0, 0.0)


@pytest.mark.parametrize("exponent", [-90, -60, 90])
def test_scale_changes_no_bits(exponent):
    a = matrix("power-1", 300, 400)
    a = a * 2.0 ** -math.frexp(a.abs().max().item())[1]
    plain, scaled = truncated_svd(a, 16, rank_of_router=4), truncated_svd(a * 2.0**exponent, 16, rank_of_router=4)
    assert torch.equal(scaled.s, plain.s * 2.0**exponent)
    assert torch.equal(scaled.vh, plain.vh)
    assert torch.equal(scaled.u, plain.u)


def test_same_bits_again_and_no_global_state():
    a = torch.nn.Parameter(matrix("power-0.5", 400, 500))
    state = torch.get_rng_state()
    first = truncated_svd(a, 16, rank_of_router=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = truncated_svd(a, 16, rank_of_router=8)
    for name in ("u", "s", "vh"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert not getattr(first, name).requires_grad
    assert first.certificate == second.certificate


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.data())
def test_lora_factors_give_the_svd_of_their_product(o, d, q, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    scale = data.draw(st.sampled_from([0.125, 2.0, -1.5]))
    b_factor, a_factor = torch.randn(o, q).to(dtype), torch.randn(q, d).to(dtype)
    rank, g = data.draw(st.integers(1, min(o, d))), data.draw(st.integers(0, min(o, d)))
    product = scale * b_factor.double() @ a_factor.double()
    result = lora_svd(b_factor, a_factor, scale, rank, rank_of_router=g)
    assert result.certificate.method == "lora"
    assert result.certificate.directions == min(q, o, d, max(rank, g))
    assert_optimal(product, result, rank, g)


def test_lora_ranks():
    b_factor, a_factor = torch.randn(300, 8), torch.randn(8, 200)
    exact = lora_svd(b_factor, a_factor, 2.0, -1)
    assert len(exact.s) == 8
    torch.testing.assert_close((exact.u * exact.s) @ exact.vh, 2 * b_factor @ a_factor, atol=2e-4, rtol=0)
    part = lora_svd(b_factor, a_factor, 2.0, 0.9, rank_of_router=12)
    held = exact.s.square().cumsum(0) / exact.s.square().sum()
    assert len(part.s) == int((held < 0.9).sum()) + 1
    assert part.certificate.energy == pytest.approx(held[len(part.s) - 1].item(), abs=1e-6)
    fresh = lora_svd(torch.zeros(300, 8), a_factor, 2.0, 4, rank_of_router=2)
    assert fresh.certificate.directions == 0
    assert fresh.certificate.error == 0


def layer(n: int, o: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    weight = (torch.randn(o, d) / d**0.5).to(dtype)
    return weight, [(weight + 0.1 * torch.randn(o, d) / d**0.5).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factors_of_a_layer(dtype):
    weight, experts = layer(3, 20, 14, dtype)
    bias, biases = torch.randn(20).to(dtype), [torch.randn(20).to(dtype), None, torch.randn(20).to(dtype)]
    factors, certificates = decompose_linear(weight, bias, experts, biases, rank_of_expert=-1, rank_of_router=5)
    wide = torch.promote_types(dtype, torch.float32)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in factors.items()} == {
        "vh": (dtype, (3, 14, 14)),
        "s": (wide, (3, 14)),
        "u": (dtype, (3, 20, 14)),
        "expert_bias": (dtype, (3, 20)),
    }
    for i, expert in enumerate(experts):
        back = (factors["u"][i].to(wide) * factors["s"][i]) @ factors["vh"][i].to(wide)
        delta = expert.to(wide) - weight.to(wide)
        assert (back - delta).norm() <= max(4 * torch.finfo(dtype).eps, 1e-14) * delta.norm()
        assert certificates[i].energy == pytest.approx(1, abs=1e-6)
        own = torch.zeros(20) if biases[i] is None else biases[i]
        assert torch.equal(factors["expert_bias"][i], (own.to(wide) - bias.to(wide)).to(dtype))


def test_adapters_beside_dense_experts():
    weight, experts = layer(1, 40, 30)
    pair = torch.randn(40, 3, dtype=torch.bfloat16), torch.randn(3, 30, dtype=torch.bfloat16), 0.5
    bias, other = torch.randn(40), torch.randn(40)
    factors, certificates = decompose_linear(
        weight, bias, [*experts, pair], [other, None], rank_of_expert=0.999, rank_of_router=4
    )
    assert [c.method for c in certificates] == ["exact", "lora"]
    assert certificates[1].rank == 3 < certificates[0].rank == factors["s"].shape[1]
    assert torch.equal(factors["expert_bias"], torch.stack([other - bias, torch.zeros(40)]))
    delta = 0.5 * pair[0].float() @ pair[1].float()
    back = (factors["u"][1] * factors["s"][1]) @ factors["vh"][1]
    torch.testing.assert_close(back, delta, atol=1e-5, rtol=0)


def test_biases_on_one_side_only():
    weight, experts = layer(2, 6, 5)
    bias = torch.randn(6)
    ranks = {"rank_of_expert": 2, "rank_of_router": 2}
    only_base, _ = decompose_linear(weight, bias, experts, [None, None], **ranks)
    assert torch.equal(only_base["expert_bias"], torch.stack([-bias, -bias]))
    only_expert, _ = decompose_linear(weight, None, experts, [None, bias], **ranks)
    assert torch.equal(only_expert["expert_bias"], torch.stack([torch.zeros(6), bias]))
    for same in ([None, None], [bias, bias.clone()]):
        none, _ = decompose_linear(weight, same[0], experts, same, **ranks)
        assert none["expert_bias"] is None


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e9])
def test_an_update_counts_by_its_size_beside_the_weight(size):
    weight, (trained,) = layer(1, 30, 40)
    rounded = (weight * 3) / 3  # only rounding errors
    assert not torch.equal(rounded, weight)
    factors, certificates = decompose_linear(
        size * weight,
        None,
        [size * trained, size * rounded, size * weight],
        [None] * 3,
        rank_of_expert=4,
        rank_of_router=4,
    )
    assert [c.directions for c in certificates] == [4, 0, 0]
    assert not factors["vh"][1:].any()


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e20, 1e37])
def test_sizes_near_the_limits_of_float32(scale):
    weight, expert = scale * torch.randn(2, 12, 10)
    factors, (certificate,) = decompose_linear(weight, None, [expert], [None], rank_of_expert=-1, rank_of_router=2)
    change = (factors["u"][0] * factors["s"][0].double() @ factors["vh"][0].double()).float()
    assert certificate.directions == 10
    assert torch.linalg.vector_norm((change - (expert - weight)).double()) < 1e-2 * (expert - weight).double().norm()


def test_changes_beyond_float32_are_refused():
    weight, large = torch.randn(12, 10), torch.full((12, 10), 3e38)
    for base, expert in ((weight, large), (-large, large)):
        with pytest.raises(ValueError, match=r"expert_weights\[0\]: its change is beyond torch\.float32"):
            decompose_linear(base, None, [expert], [None], rank_of_expert=2, rank_of_router=2)
    bias = torch.full((12,), 6e4).half()
    with pytest.raises(ValueError, match=r"expert_biases\[1\]: its change is beyond torch\.float16"):
        decompose_linear(weight.half(), bias, [weight.half()] * 2, [bias, -bias], rank_of_expert=2, rank_of_router=2)


def test_refuses_bad_matrices_and_ranks():
    a = torch.randn(5, 4)
    for bad in (torch.randn(5), torch.randn(2, 3, 4), torch.empty(0, 3)):
        with pytest.raises(ValueError, match=r"a: has shape .* expected a non-empty matrix"):
            truncated_svd(bad, 1)
    with pytest.raises(TypeError, match=r"a: is torch\.int64; expected a floating-point"):
        truncated_svd(a.long(), 1)
    for value in (math.nan, math.inf, -math.inf):
        b = a.clone()
        b[2, 3] = value
        with pytest.raises(ValueError, match=r"a: 1 entries are NaN or inf, the first at \(2, 3\)"):
            truncated_svd(b, 1)
    for rank in (0, 5, -2, 0.0, 1.0, 2.5, math.nan):
        with pytest.raises(ValueError, match=r"rank: is .*; expected (an integer, )?1 to 4"):
            truncated_svd(a, rank)
    for g in (-1, 5):
        with pytest.raises(ValueError, match=f"rank_of_router: is {g}; expected 0 to 4"):
            truncated_svd(a, 1, rank_of_router=g)
    with pytest.raises(ValueError, match="rank: is '3'"):
        truncated_svd(a, "3")
    with pytest.raises(ValueError, match=r"a_factor: has shape \(3, 5\) with b_factor's"):
        lora_svd(torch.randn(4, 2), torch.randn(3, 5), 1.0, 1)
    with pytest.raises(ValueError, match="scale: is inf"):
        lora_svd(torch.randn(4, 2), torch.randn(2, 5), math.inf, 1)


def test_refuses_experts_that_do_not_fit():
    weight, experts = layer(2, 6, 5)
    ranks = {"rank_of_expert": 2, "rank_of_router": 2}
    broken = experts[1].clone()
    broken[1, 2] = math.nan
    pair = torch.randn(6, 2), torch.randn(2, 5), 1.0
    for experts_, biases, message in (
        ([], [], "expert_weights: is empty"),
        (experts, [None], "expert_biases: has 1 entries; expected 2"),
        ([experts[0], experts[1].T.contiguous()], [None] * 2, r"expert_weights\[1\]: .*\(5, 6\); expected .*\(6, 5\)"),
        ([experts[0].bfloat16()], [None], r"expert_weights\[0\]: torch.bfloat16 .*; expected torch.float32"),
        ([experts[0], broken], [None] * 2, r"expert_weights\[1\]: 1 entries are NaN or inf, the first at \(1, 2\)"),
        (
            [experts[0], (*pair[1::-1], 1.0)],
            [None] * 2,
            r"expert_weights\[1\]: factors .*; expected a product of shape",
        ),
        (experts, [None, torch.randn(5)], r"expert_biases\[1\]: shape \(5,\); expected \(6,\)"),
        (experts, [None, torch.full((6,), math.inf)], r"expert_biases\[1\]: .* finite"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose_linear(weight, None, experts_, biases, **ranks)
    for name, value in (("rank_of_expert", 6), ("rank_of_router", 6), ("rank_of_router", 0)):
        with pytest.raises(ValueError, match=f"{name}: is {value}; expected"):
            decompose_linear(weight, None, experts, [None] * 2, **{**ranks, name: value})
