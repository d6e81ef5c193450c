"""Warm-up, tuning, and the tables that tuning writes."""

import json

import pytest
import torch

import smile_kernels
from smile_kernels.integrations.quantization import split_base
from smile_kernels.ops.triton import backend, common, configs, decode, tuning
from smile_kernels.testing import Problem

DEVICE = "cpu" if backend.INTERPRETED.value else "cuda"


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """Each test has its own user table, which is removed afterwards."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    configs.tables.cache_clear()
    yield
    configs.tables.cache_clear()


def parameters(p: Problem) -> tuple:
    return (*p.arguments()[1:], p.num_experts_per_tok, p.rank_of_router)


def record_launches(monkeypatch, tell) -> None:
    """Record every launch: the kernel's name and its constants."""
    kernels = type(common.dot)
    launcher = kernels.__getitem__

    def record(kernel, grid):
        def launch(*args, **constants):
            tell((kernel.fn.__module__, kernel.fn.__name__, *sorted(constants.items())))
            return launcher(kernel, grid)(*args, **constants)

        return launch

    monkeypatch.setattr(kernels, "__getitem__", record)


@pytest.mark.parametrize(("training", "router"), [(False, False), (True, False), (True, True)])
def test_after_warmup_a_layer_compiles_nothing(training, router, device, monkeypatch):
    p = Problem.random(3, 16, 18, 3, 4, 2, 2, router=router, device=device)
    launched = []
    record_launches(monkeypatch, launched.append)
    tuning.warmup(*parameters(p), tokens=[3], training=training)
    warm = set(launched)
    launched.clear()
    y, weights, ids, h = backend.linear(*p.arguments(), 2, 2, training)
    if training:
        factors = *p.arguments()[:2], *p.arguments()[3:7]
        backend.apply_backward(y, *factors, weights, ids, h, [True] * 8)
        backend.linear_backward(y, *factors, p.router, weights, ids, h, 2, [True] * 7 + [router])
    assert launched
    assert set(launched) <= warm


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_warmed_up_once_for_each_shape(training, monkeypatch):
    layers = [smile_kernels.SmileLinear(16, out, 3, 4, 2, 2) for out in (18, 18, 20)]
    warmed = []
    warmup = tuning.warmup
    monkeypatch.setattr(
        tuning, "warmup", lambda *args, **kwargs: warmed.append(args[0].shape) or warmup(*args, **kwargs)
    )
    model = torch.nn.Sequential(*layers, torch.nn.Linear(20, 4)).to(DEVICE)
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "torch")
    smile_kernels.warmup(model, [3], training=training)
    assert warmed == []
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "triton")
    smile_kernels.warmup(model, [1, 3], training=training)
    assert warmed == [(18, 16), (20, 16)]
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"tokens\[1\]: is 0; expected 1 or more"):
        smile_kernels.warmup(model, [3, 0])


@pytest.mark.parametrize("training", [False, True])
def test_experts_that_are_added_to_a_base_product_are_warmed_up(training, monkeypatch):
    merged = smile_kernels.SmileLinear.merge([smile_kernels.SmileLinear(16, out, 3, 4, 2, 2) for out in (18, 20)])
    beside = split_base(smile_kernels.SmileLinear(16, 18, 3, 4, 2, 2))
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "triton")
    launched = []
    record_launches(monkeypatch, launched.append)
    for layer in (merged.to(DEVICE), beside.to(DEVICE)):
        smile_kernels.warmup(torch.nn.Sequential(layer), [3], training=training)
        warm = set(launched)
        launched.clear()
        with torch.set_grad_enabled(training):
            y = layer(torch.randn(3, 16, device=DEVICE))
            if training:
                y.sum().backward()
        assert launched
        assert set(launched) <= warm
        launched.clear()


@pytest.mark.parametrize(
    ("linear", "apply"), [("one_product", "fused"), ("one_product", "delta"), ("route_first", "grouped")]
)
def test_what_is_compiled_does_not_depend_on_the_batch(linear, apply, device, monkeypatch, take):
    """Between two powers of two, every number of tokens launches the same kernels with the same constants."""
    take(linear, apply)
    launched = set()
    record_launches(monkeypatch, launched.add)
    found = []
    for tokens in (33, 50, 64):
        launched.clear()
        p = Problem.random(tokens, 16, 18, 3, 4, 2, 2, device=device)
        tuning.warmup(*parameters(p), tokens=[tokens], training=True)
        found.append(set(launched))
    assert found[0]
    assert found[0] == found[1] == found[2]


def test_tuning_takes_the_fastest_and_other_processes_read_it(device, monkeypatch):
    """With simulated times for which one path and one tile are best."""
    p = Problem.random(40, 32, 32, 3, 4, 2, dtype=torch.bfloat16, device=device)
    name = configs.device_of(p.x.device).name
    chosen = []

    def seconds(run):
        choices = configs.tables()[name]
        path = next(v for k, v in choices.items() if k.startswith("apply"))
        tile = next((v for k, v in choices.items() if k.startswith("expand")), {"BLOCK_T": 0})
        return 1.0 - 0.5 * (path == "delta") - 0.25 * (tile["BLOCK_T"] == 16)

    monkeypatch.setattr(tuning, "_seconds", seconds)
    best = tuning.tune(*parameters(p), tokens=[40], report=lambda *args: chosen.append(args))
    dims = "32 32 4 4 1"
    assert best["apply half 64 " + dims] == "delta"
    assert best["expand half 64 32 16"]["BLOCK_T"] == 16
    assert min(seconds for *_, seconds in chosen) == 0.25
    want = configs.Device(name, "interpreter", 4, False, True), torch.bfloat16, 40, 32, 32, 3, 4, 1
    assert configs.apply_path(*want) == "delta"

    configs.tables.cache_clear()
    assert configs.apply_path(*want) == "fused" if device == "cpu" else True
    tuning.save(p.x.device, {"an older": "choice"})
    tuning.save(p.x.device, best)
    configs.tables.cache_clear()
    assert configs.apply_path(*want) == "delta"
    table = json.loads(configs.user_table().read_text())
    assert table[name]["an older"] == "choice"
    assert list(configs.user_table().parent.iterdir()) == [configs.user_table()]


def test_a_table_that_names_what_cannot_run_is_passed_over(device):
    gpu = configs.Device("a GPU", "sm90", 132, pdl=True, tma=False)
    shape = 2048, 4096, 4096, 8, 32, 1
    key = "apply half 2048 4096 4096 8 32 1"
    configs.tables()["a GPU"] = {key: "tma", "expand half 2048 4096 4096": {"BLOCK_T": 7}}
    assert configs.apply_path(gpu, torch.bfloat16, *shape) == "delta"
    assert configs.tile("expand", gpu, torch.bfloat16, 2048, 4096, 4096)["BLOCK_T"] == 128


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, '{"a GPU": 5}'], ids=["cut", "list", "deep", "number"])
def test_a_broken_table_is_named(content):
    configs.user_table().parent.mkdir(parents=True)
    configs.user_table().write_text(content)
    with pytest.raises(ValueError, match=r"triton\.json: is not valid JSON"):
        configs.tables()


def test_counters_of_decode_are_not_shared(device):
    slots = [decode.arrivals(torch.device(device, 0) if device == "cuda" else torch.device(device)) for _ in range(3)]
    assert len({t.data_ptr() for t in slots}) == 3
    assert all((t == 0).all() for t in slots)


@pytest.mark.parametrize("linear", ["decode", "decode_one_launch"])
def test_decode_leaves_its_counters_at_zero(linear, device, take, monkeypatch):
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    monkeypatch.setattr(decode, "arrivals", lambda _: counters)
    take(linear)
    p = Problem.random(5, 70, 90, 4, 16, 3, 2, dtype=torch.bfloat16, device=device)
    first = backend.linear(*p.arguments(), 2, 3, False)
    assert counters.tolist() == [0, 0]
    for a, b in zip(first, backend.linear(*p.arguments(), 2, 3, False)):
        assert torch.equal(a, b)
