"""bench/gpu.py, all of it that runs without a GPU: its rows, paths and soak on the interpreter, times made up."""

import json
import sys

import pytest
import torch

from bench import cost, gpu
from smile_kernels.benchmark.problems import Case, Setting
from smile_kernels.ops.triton import configs
from smile_kernels.testing import taking


@pytest.fixture
def small(monkeypatch):
    """A grid of one layer; a sample is one call, said to take a microsecond for each letter of its name."""

    def interleave(calls, device, seconds):
        for call in calls.values():
            call()
        return {name: {"wall_us": [float(len(name))] * 2} for name in calls}

    monkeypatch.setattr(gpu, "interleave", interleave)
    monkeypatch.setattr(gpu, "graphed", lambda call: call)
    monkeypatch.setitem(gpu.PEERS, "fusion_bench", gpu.PEERS["smile:torch"])
    monkeypatch.setattr(gpu, "LAYERS", ["48x32"])
    monkeypatch.setattr(gpu, "SETTINGS", [Setting(3, 4, 2, 2)])
    monkeypatch.setattr(gpu, "TOKENS", [3, 70])
    monkeypatch.setattr(gpu, "TRAINED", [Case("48x32", Setting(3, 4, 2, 2), 5, torch.bfloat16)])
    gpu._largest.cache_clear()
    yield
    gpu._largest.cache_clear()


def test_every_row_of_the_grid_is_measured(small, device):
    records = [{"name": name, **run()} for name, run in gpu.plan(600).items()]
    assert [(r["tokens"], r["mode"]) for r in records] == [
        *((tokens, mode) for tokens in (3, 70) for mode in ("graph", "eager")),
        *((5, mode) for mode in ("training graph", "training eager")),
    ]
    few, many = records[1]["us"].keys(), records[2]["us"].keys()
    assert {"F.linear", "chosen", "decode fused", "single fused", "together tma", "first fused"} < few
    assert {"together delta", "first grouped"} < many
    assert "fusion_bench" in few
    assert "fusion_bench" not in many
    assert records[4]["us"].keys() == {"F.linear", "chosen"}
    if device == "cpu":
        assert "cuda" in records[0]["cannot_run"]["smile:cuda"]
    assert json.loads(json.dumps(records)) == records
    # 12 letters to 8; the layer is too small for the aim of decode.
    assert gpu.over_linear(records[1])["fusion_bench"] == 12 / 8
    lines = gpu.aims(records)
    assert lines[0].startswith("MISSED: 48x32 N3 r4 g2 top-2 T3 eager: 2.0 times as fast as fusion_bench, at least 10")
    assert len(lines) == 3
    assert all("T5 training" in line and ": 0.75, at most" in line for line in lines[1:])


def test_a_wrong_path_is_not_timed(small, device, monkeypatch):
    linear = gpu.backend.linear
    monkeypatch.setattr(gpu.backend, "linear", lambda *args: (linear(*args)[0] * 1.5, None))
    with pytest.raises(AssertionError, match=r"chosen is 0\.[45].* from the oracle"):
        gpu.forward(Case("48x32", Setting(3, 4, 2, 2), 3, torch.bfloat16), graph=False)


def test_rows_are_refused_when_the_time_is_over(small):
    with pytest.raises(SystemExit, match="goes on from here"):
        next(iter(gpu.plan(-1).values()))()


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 2048])
@pytest.mark.parametrize("setting", gpu.SETTINGS, ids=str)
def test_the_grid_holds_what_the_heuristics_choose(setting, tokens):
    for layer in gpu.LAYERS:
        linear, apply = cost.chosen_paths(Case(layer, setting, tokens, torch.bfloat16), cost.DEVICE)
        path = (linear, "fused") if linear == "decode" else (linear, apply)
        assert path in gpu.paths(tokens, setting)


def test_soak_passes_and_names_what_fails(device, monkeypatch):
    assert gpu.soak(1, largest=6) > 0
    linear = gpu.backend.linear
    monkeypatch.setattr(gpu.backend, "linear", lambda *args: (linear(*args)[0] + 9, *linear(*args)[1:]))
    with pytest.raises(SystemExit, match=r"tokens, .* seed \d+: y: off by"):
        gpu.soak(5, largest=6)


def test_paths_are_taken_only_for_a_while():
    before = configs.linear_path, configs.apply_path
    with taking("first", "delta"):
        assert configs.linear_path() == "first"
        assert configs.apply_path() == "delta"
    assert before == (configs.linear_path, configs.apply_path)


def test_without_a_gpu_or_its_tools_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--soak", "1"])
    with pytest.raises(SystemExit, match="no GPU is visible"):
        gpu.main()
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="compute-sanitizer: not found"):
        gpu.sanitize()
