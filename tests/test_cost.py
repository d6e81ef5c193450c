"""The cost model of bench/cost.py against cases worked by hand."""

import pytest

from bench.cost import Shape, Work, backward, dense, kernels, layer, total


def test_the_dense_layer():
    # x 4096, W 4096 x 4096 and y 4096 numbers of two bytes; one multiplication and one addition for each number of W.
    work = dense(Shape(1, 4096, 4096, 8, 32, 16))
    assert work == Work(2 * (4096 + 16777216 + 4096), 33554432)
    assert work.floor(33570816, 1e18) == 1.0
    assert work.floor(1e18, 33554432) == 1.0


@pytest.mark.parametrize(
    ("setting", "experts", "ratio"),
    [
        # Router: 8 x 16 rows of 8 KB = 1048576 bytes. One expert: 16 rows more of vh, 131072; u, 262144; s, 128.
        ((8, 32, 16), 1, (33570816 + 1048576 + 131072 + 262144 + 128) / 33570816),
        # All experts: 8 times the latter.
        ((8, 32, 16), 8, (33570816 + 1048576 + 8 * (131072 + 262144 + 128)) / 33570816),
        # A router of more rows than the expert has: nothing of vh is left to read.
        ((8, 4, 16), 1, (33570816 + 1048576 + 4096 * 4 * 2 + 16) / 33570816),
    ],
)
def test_decode_is_bound_by_what_is_read(setting, experts, ratio):
    shape = Shape(1, 4096, 4096, *setting)
    assert layer(shape, experts).bytes / dense(shape).bytes == pytest.approx(ratio, rel=1e-12)


def test_prefill_is_bound_by_products():
    # Per token: W 4096 x 4096; the router 128 x 4096; of one expert 16 x 4096 of vh and 32 x 4096 of u.
    shape = Shape(8192, 4096, 4096, 8, 32, 16)
    assert layer(shape).flops == 2 * 8192 * 4096 * (4096 + 128 + 16 + 32)
    assert layer(shape).floor(4.3e12, 780e12) == layer(shape).flops / 780e12


def test_experts_present():
    shape = Shape(2, 16, 16, 4, 2, 2)
    # Two tokens, four experts: the second chooses the same with probability 1/4.
    assert shape.present() == pytest.approx(0.25 * 1 + 0.75 * 2)
    assert shape.present(1) == pytest.approx(1)
    assert Shape(1, 16, 16, 4, 2, 2, m=4).present() == pytest.approx(4)


def test_the_paths_of_a_small_layer():
    # 2 tokens, D 8, O 4, 2 experts of rank 2 with 1 router row, numbers of 2 bytes, everyone present.
    shape = Shape(2, 8, 4, 2, 2, 1)
    shrink = Work(2 * (2 + 4) * 8 + 4 * 3 * 2 * 4, 2 * 2 * 8 * 4)
    base = Work(2 * (16 + 32 + 8), 2 * 2 * 8 * 4)
    assert kernels(shape, "decode", splits=3) == {
        "shrink": shrink,
        "stream": base + Work(2 * 4 * 4 + 4 * 3 * 2 * 4, 2 * 2 * 4 * 4),
    }
    fused = kernels(shape, "fused", splits=3)
    assert fused["shrink"] == shrink
    assert fused["route"] == Work(4 * 3 * 2 * 4 + 2 * 2 * 4 + 8 * 2, 2 * 2 * 2 + 2 * 2)
    # round(1.5) = 2 experts in the block, and altogether.
    assert fused["expand"] == base + Work(2 * (2 * 4 + 2 * 2 * 4), 2 * 2 * 4 * 4)
    delta = kernels(shape, "delta", splits=3)
    assert total(delta).bytes == total(fused).bytes + 2 * 2 * (2 * 4)
    assert total(delta).flops == total(fused).flops
    with pytest.raises(ValueError, match="path: is 'x'"):
        kernels(shape, "x")


def test_grouping_avoids_what_a_dense_tail_multiplies():
    shape = Shape(8192, 4096, 4096, 64, 64, 8)
    fused, grouped = kernels(shape, "fused"), kernels(shape, "grouped")
    # Every token meets 64 of 4096 ranks; a block of 128 tokens meets 55.5, rounded to 55 or 56 experts, on average.
    assert grouped["scatter"].flops == 2 * 8192 * 64 * 4096
    assert fused["expand"].flops - dense(shape).flops == 2 * 8192 * 55 * 64 * 4096
    assert grouped["gate"].flops + grouped["gather"].flops == 2 * 8192 * (64 * 8 + 64) * 4096


def test_two_experts_a_token_pass_over_y_again():
    one, two = (kernels(Shape(2048, 4096, 4096, 64, 64, 8, m), "grouped")["scatter"] for m in (1, 2))
    extra = 2 * (2048 * 64 + 2 * 2048 * 4096)
    assert two.bytes - one.bytes == extra


def test_backward_costs_two_dense_products_and_little_more():
    shape = Shape(8192, 4096, 4096, 8, 32, 16)
    work = total(backward(shape))
    # a, dx, dvh and du: each 32 of 4096 ranks.
    assert work.flops == 2 * dense(shape).flops + 4 * 2 * 8192 * 32 * 4096 + 5 * 8192 * 32
