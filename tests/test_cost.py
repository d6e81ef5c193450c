"""The cost model of `Case.work` and bench/cost.py, compared with cases computed by hand, and with the launches."""

import pytest
import torch
from triton.runtime.jit import KernelInterface

from bench import cost
from bench.cost import backward, kernels
from smile_kernels.benchmark.problems import Case, Setting, Work
from smile_kernels.ops.triton import backend, configs


def case(tokens: int, *setting: int, layer: str = "mistral-7b.q") -> Case:
    return Case(layer, Setting(*setting), tokens, torch.bfloat16)


def total(works: dict[str, Work]) -> Work:
    return sum(works.values(), Work(0, 0))


def test_the_dense_layer():
    # x 4096, W 4096 x 4096 and y 4096 numbers of two bytes; one multiplication and one addition for each number of W.
    work = case(1, 8, 32, 16).dense()
    assert work == Work(2 * (4096 + 16777216 + 4096), 33554432)
    assert work.floor(33570816, 1e18) == 1.0
    assert work.floor(1e18, 33554432) == 1.0
    # With the backward: x, W, y; x, W, dy; dx, dW. Three products.
    assert case(1, 8, 32, 16).dense(backward=True) == Work(2 * (8 * 4096 - 3 * 4096 + 3 * 16777216), 3 * 33554432)


@pytest.mark.parametrize(
    ("setting", "experts", "ratio"),
    [
        # Router: 8 x 16 rows of 8 KB = 1048576 bytes. One expert: 16 more rows of vh, 131072; u, 262144; s, 128.
        ((8, 32, 16), 1, (33570816 + 1048576 + 131072 + 262144 + 128) / 33570816),
        # All experts: 8 times the latter.
        ((8, 32, 16), 8, (33570816 + 1048576 + 8 * (131072 + 262144 + 128)) / 33570816),
        # A router with more rows than the expert has: no other rows of vh are read.
        ((8, 4, 16), 1, (33570816 + 1048576 + 4096 * 4 * 2 + 16) / 33570816),
    ],
)
def test_decode_is_bound_by_what_is_read(setting, experts, ratio):
    one = case(1, *setting)
    assert one.work(experts).bytes / one.dense().bytes == pytest.approx(ratio, rel=1e-12)


def test_prefill_is_bound_by_products():
    # Per token: W 4096 x 4096; the router 128 x 4096; of one expert 16 x 4096 of vh and 32 x 4096 of u.
    work = case(8192, 8, 32, 16).work()
    assert work.flops == 2 * 8192 * 4096 * (4096 + 128 + 16 + 32)
    assert work.floor(4.3e12, 780e12) == work.flops / 780e12


def test_experts_present():
    two = case(2, 4, 2, 2)
    # Two tokens, four experts: the second chooses the same with probability 1/4.
    assert two.present() == pytest.approx(0.25 * 1 + 0.75 * 2)
    assert two.present(1) == pytest.approx(1)
    assert case(1, 4, 2, 2, 4).present() == pytest.approx(4)


def test_the_launches_of_a_small_layer():
    # 2 tokens, D 8, O 4, a bias, 2 experts of rank 2 with 1 router row, numbers of 2 bytes, everyone present.
    small = case(2, 2, 2, 1, layer="8x4")
    shrink = Work(2 * (2 + 4) * 8 + 4 * 3 * 2 * 4, 2 * 2 * 8 * 4)
    base = Work(2 * (16 + 32 + 4 + 8), 2 * 2 * 8 * 4)
    # The partial sums once more, s [2, 2], weights and ids; scaled [2, 2, 2] and gates [2, 2], which are read again.
    first = shrink + Work(4 * 3 * 2 * 4 + 4 * 4 + 16 + 2 * 8 + 4 * 4, 0)
    # u [2, 4, 2] and expert_bias [2, 4].
    stream = base + Work(2 * (16 + 8) + 2 * 8 + 4 * 4, 2 * 2 * 4 * 4)
    assert kernels(small, "decode", "fused", splits=3) == {"shrink": first, "stream": stream}
    assert kernels(small, "decode_one_launch", "fused", splits=3) == {"shrink, stream": first + stream}
    fused = kernels(small, "one_product", "fused", splits=3)
    assert fused["shrink"] == shrink
    # One router row of each of two experts, then two rows of the chosen one; weights and ids; scaled and gates written.
    assert fused["route and scale"] == Work(4 * 3 * 2 * 2 + 16 + 4 * 3 * 2 * 2 + 2 * 2 * 2 * 3, 2 * 2 * 2 + 2 * 2)
    # round(1.5) = 2 experts in the block and altogether: scaled [2, 4], gates [2, 2], u and expert_bias.
    assert fused["expand"] == base + Work(2 * (8 + 4 + 16 + 8), 2 * 2 * 4 * 4 + 2 * 2 * 2 * 4)
    delta = kernels(small, "one_product", "delta", splits=3)
    assert total(delta).bytes == total(fused).bytes + 2 * 2 * (2 * 4)
    assert total(delta).flops == total(fused).flops
    with pytest.raises(ValueError, match="apply: is 'x'"):
        kernels(small, "one_product", "x")


def test_grouping_avoids_what_a_dense_tail_multiplies():
    many = case(8192, 64, 64, 8)
    fused, grouped = kernels(many, "one_product", "fused"), kernels(many, "route_first", "grouped")
    # Every token uses 64 of 4096 ranks; a block of 128 tokens uses 55.5 experts on average, rounded to 55 or 56.
    assert grouped["scatter 0"].flops == 2 * 8192 * 64 * 4096
    assert fused["expand"].flops - many.dense().flops == 2 * 8192 * 55 * 64 * 4096
    assert grouped["gate"].flops + grouped["gather"].flops == 2 * 8192 * (64 * 8 + 64) * 4096


def test_two_experts_a_token_pass_over_y_again():
    one, two = (total(_scatters(kernels(case(2048, 64, 64, 8, m), "route_first", "grouped"))) for m in (1, 2))
    assert two.bytes - one.bytes == 2 * (2048 * 64 + 2 * 2048 * 4096)
    assert two.flops == 2 * one.flops


def _scatters(works: dict[str, Work]) -> dict[str, Work]:
    return {name: work for name, work in works.items() if name.startswith("scatter")}


def test_backward_costs_two_dense_products_and_little_more():
    small = case(8192, 8, 32, 16)
    # a, dx, dvh and du: each 32 of 4096 ranks, or those of all eight experts.
    for apply, ranks in (("grouped", 32), ("delta", 8 * 32)):
        flops = total(backward(small, apply)).flops
        assert flops == 2 * small.dense().flops + 4 * 2 * 8192 * ranks * 4096 + 7 * 8192 * 32


def test_two_experts_a_token_cost_as_one_where_every_expert_takes_all_tokens():
    one, two = (total(backward(case(8192, 8, 32, 16, m), "delta")) for m in (1, 2))
    assert two.flops - one.flops == 7 * 8192 * 32
    assert two.bytes - one.bytes == 4 * 2 * 8192 * 32


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(
    ("linear", "apply"),
    [
        *(("decode", "fused"), ("decode_one_launch", "fused"), ("one_product", "fused"), ("one_product", "delta")),
        *(("route_first", "fused"), ("route_first", "grouped")),
    ],
)
def test_every_launch_is_counted(linear, apply, m, monkeypatch):
    """The number of launches is that of the model, including cuBLAS's products."""
    if reason := backend.why_not("cpu", torch.float32, 1, False):
        pytest.skip(reason)
    small = case(5, 3, 4, 2, m, layer="16x24")
    p = small.problem("cpu")
    monkeypatch.setattr(configs, "linear_path", lambda *_: linear)
    monkeypatch.setattr(configs, "apply_path", lambda *_: apply)
    launches = []
    launch = KernelInterface.__getitem__
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda *args: launches.append(1) or launch(*args))
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: launches.append(1) or addmm(*args))
    y, weights, ids, h = backend.linear(*p.arguments(), m, 2, linear not in ("decode", "decode_one_launch"))
    assert len(launches) == len(kernels(small, linear, apply))
    if h.numel():
        launches.clear()
        factors = *p.arguments()[:2], *p.arguments()[3:7]
        backend.linear_backward(y, *factors, None, weights, ids, h, 2, [True] * 7 + [False])
        by_torch = {"dweight", "dbias"}
        if apply != "grouped":
            by_torch |= {"dvh", "ds", "du", "du transposed", "dexpert_bias"}
        assert len(launches) == len(backward(small, apply).keys() - by_torch)


def test_predictions_name_every_case():
    tables = cost.tables()
    assert tables["graph"].count("→") == len(cost.LAYERS) * len(cost.SETTINGS) * len(cost.TOKENS)
    assert tables["training"].count("mistral-7b.q") == len(cost.TRAINED)
    # Decode of the most common setting: the floor, the prediction, the path.
    assert "1.04 → 1.11 d" in tables["graph"]
