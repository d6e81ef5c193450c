"""Subspace analysis, compared with plain computations in float64."""

import copy
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels import analysis
from smile_kernels.analysis import ZONES, analyze, analyze_layer, keep_zone, zone
from smile_kernels.cli import app
from tests.upscaling.checkpoints import Net, finetuned

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 7), (7, 1)]


def zone_of(a: int, b: int, k: int, q: int) -> str:
    if a < k and b < k:
        return "I"
    if a < k or b < k:
        return "mixed"
    return "II" if a < q and b < q else "III"


def parts(weight: torch.Tensor, change: torch.Tensor) -> dict[str, torch.Tensor]:
    """The zones by their definition, one coordinate at a time, in all of U's and V's columns."""
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=True)
    sums, k = sigma.cumsum(0), 1
    while sums[k - 1] < 0.5 * sums[-1]:
        k += 1
    result = {name: torch.zeros_like(change, dtype=torch.float64) for name in ZONES}
    for a in range(weight.shape[0]):
        for b in range(weight.shape[1]):
            direction = torch.outer(u[:, a], vh[b])
            result[zone_of(a, b, k, len(sigma))] += (direction * change.double()).sum() * direction
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zones_are_those_of_the_definition(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    tuned = (weight + 0.1 * torch.randn(shape)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    change = tuned.to(wide) - weight.to(wide)
    want = parts(weight, change)
    for name in ZONES:
        got = zone(weight, tuned, name)
        assert got.dtype == wide
        torch.testing.assert_close(got.double(), want[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(zone(weight, tuned, "II+III+I+mixed"), change, atol=1e-6, rtol=1e-6)
    total = change.double().square().sum()
    (found,) = analyze_layer("a", weight.to(wide), [change]).changes
    for name in ZONES:
        assert found.zones[name] == pytest.approx((want[name].square().sum() / total).item(), abs=1e-5)
    assert sum(found.zones.values()) == pytest.approx(1)


def test_zones_are_those_of_the_published_implementation():
    from fusion_bench.method.smile_upscaling import projected_energy

    weight = torch.randn(14, 22)
    tuned = weight + 0.1 * torch.randn(14, 22)
    (kind,) = (value for name, value in vars(projected_energy).items() if hasattr(value, "analyze_weight"))
    theirs = kind.__new__(kind)
    theirs.device = "cpu"
    want = theirs.analyze_weight(weight, tuned)
    (found,) = analyze_layer("a", weight, [tuned - weight]).changes
    assert found.zones["I"] == pytest.approx(want["projected_energy_I"], rel=1e-4)
    assert found.zones["II"] == pytest.approx(want["projected_energy_II"], rel=1e-4)
    assert found.zones["II"] + found.zones["III"] == pytest.approx(want["projected_energy_II_III"], rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_energy_and_interference_are_those_of_plain_merges(rank):
    weight = torch.randn(10, 18, dtype=torch.float64)
    changes = [torch.randn(10, 18, dtype=torch.float64) for _ in range(3)]
    found = analyze_layer("a", weight, changes, rank_of_expert=rank, scale=0.4)
    total = sum(change.square().sum() for change in changes)

    def left(merged: list[torch.Tensor]) -> float:
        return (sum((m - c).square().sum() for m, c in zip(merged, changes)) / total).item()

    def cut(change: torch.Tensor, r: int) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        return u[:, :r] * s[:r] @ vh[:r]

    assert found.interference.average == pytest.approx(left([sum(changes) / 3] * 3))
    assert found.interference.task_arithmetic == pytest.approx(left([0.4 * sum(changes)] * 3))
    assert found.interference.expanded == pytest.approx(left([cut(c, rank) for c in changes]), abs=1e-12)
    for one, change in zip(found.changes, changes):
        held = [(cut(change, r).square().sum() / change.square().sum()).item() for r in (1, 2, 4, 8, 10)]
        assert one.energy == pytest.approx(held)
        assert one.norm == pytest.approx(change.norm().item())
        assert one.relative == pytest.approx((change.norm() / weight.norm()).item())
    cosine = torch.nn.functional.cosine_similarity(changes[0].flatten(), changes[1].flatten(), dim=0)
    assert found.cosines[0][1] == pytest.approx(cosine.item())


def test_a_layer_of_several_dtypes():
    weight, change = torch.randn(6, 9, dtype=torch.bfloat16), torch.randn(6, 9, dtype=torch.float64)
    found = analyze_layer("a", weight, [change, change.half()])
    assert found == analyze_layer("a", weight.double(), [change, change.half().double()])
    eight = weight.to(torch.float8_e4m3fn)  # which PyTorch promotes to no other dtype
    assert analyze_layer("a", eight, [change]) == analyze_layer("a", eight.double(), [change])
    assert torch.equal(zone(eight, change, "I"), zone(eight.double(), change, "I"))


def test_a_layer_without_changes_is_refused():
    with pytest.raises(sk.SmileError, match=r"^changes: is empty; expected one matrix or more"):
        analyze_layer("a", torch.randn(4, 6), [])


@pytest.mark.parametrize("scale", [math.nan, -math.inf, -1e9])
def test_a_scale_without_a_meaning_is_refused(scale):
    with pytest.raises(sk.SmileError, match=r"^scale: is \S+; expected a finite number, of at most 1e9"):
        analyze_layer("a", torch.randn(4, 6), [torch.ones(4, 6)], scale=scale)


@pytest.mark.parametrize("half", [Fraction(1, 2), Decimal("0.5"), np.float32(0.5), torch.tensor(0.5)], ids=repr)
def test_numbers_of_other_kinds_are_taken(half, folders, tmp_path):
    found = analyze(folders[0], folders[1:2], scale=half)
    found.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["scale"] == 0.5
    assert found == analyze(folders[0], folders[1:2], scale=0.5)


def test_a_layer_that_nothing_changes_has_no_shares():
    found = analyze_layer("a", torch.randn(4, 6), [torch.zeros(4, 6)] * 2)
    assert found.interference == analysis.Interference(0.0, 0.0, 0.0)
    assert found.changes[0].zones == dict.fromkeys(ZONES, 0.0)
    assert found.cosines == [[0.0, 0.0], [0.0, 0.0]]
    assert found.changes[0].energy[-1] == 0.0


def test_checkpoints_and_adapters(tmp_path, folders, models):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(2, 16), torch.randn(24, 2)
    factors = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    told = []
    found = analyze(folders[0], [folders[1], adapter], progress=lambda *each: told.append(each))
    assert told == [("layers", 1, 2), ("layers", 2, 2)]
    base, tuned = models[:2]
    layers = {layer.name: layer for layer in found.layers}
    assert layers.keys() == {"up", "down"}
    want = analyze_layer("up", base.up.weight, [tuned.up.weight - base.up.weight, 2 * b @ a])
    assert layers["up"].interference.average == pytest.approx(want.interference.average, rel=1e-5)
    for one, other in zip(layers["up"].changes, want.changes):
        assert one.zones == pytest.approx(other.zones, abs=1e-6)
    assert layers["up"].changes[1].energy[1] == pytest.approx(1)  # rank 2
    assert layers["down"].changes[1].norm == 0
    means = analysis.means_of(found.layers)
    total = sum(change.norm**2 for layer in found.layers for change in layer.changes)
    first = sum(change.norm**2 * change.zones["I"] for layer in found.layers for change in layer.changes)
    assert means["I"] == pytest.approx(first / total)


def test_the_command(tmp_path, folders):
    paths = [str(tmp_path / name) for name in ("a.png", "a.json")]
    experts = [part for folder in folders[1:] for part in ("--expert", str(folder))]
    arguments = ["analyze", "--base", str(folders[0]), *experts]
    for _ in range(2):  # and replaces its own
        result = CliRunner().invoke(app, [*arguments, "--plot", paths[0], "--json", paths[1]])
        assert result.exit_code == 0, result.output
    assert "zone I" in result.output
    assert (tmp_path / "a.png").stat().st_size > 5000
    stored = json.loads((tmp_path / "a.json").read_text())
    assert {layer["name"] for layer in stored["layers"]} == {"up", "down"}
    assert len(stored["layers"][0]["changes"]) == len(folders) - 1
    assert "down" in CliRunner().invoke(app, [*arguments, "--table"]).output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--plot": "none/a.png"}, "plot: is 'none/a.png'; expected a file in a folder that exists"),
        ({"--plot": "a.txt"}, "plot: is 'a.txt'; expected a name that ends with"),
        ({"--rank-of-expert": "0"}, "rank_of_expert: is 0; expected 1 or more"),
        ({"--scale": "nan"}, "scale: is nan; expected a finite number"),
        ({"--workers": "0"}, "workers: is 0; expected 1 or more"),
        ({"--include": "x"}, "leaves none of the 2 linear layers"),
        ({"--expert": "nowhere"}, "nowhere: no such folder"),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_refused_before_work(tmp_path, monkeypatch, folders, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"--base": str(folders[0]), "--expert": str(folders[1])} | changes
    result = CliRunner().invoke(app, ["analyze", *(part for option in options.items() for part in option)])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " "), result.output


def test_a_zone_alone_is_kept_in_a_model():
    base = Net()
    tuned = finetuned(base)
    whole, some = copy.deepcopy(tuned), copy.deepcopy(tuned)
    keep_zone(base, whole, "+".join(ZONES))
    for one, other in zip(whole.parameters(), tuned.parameters()):
        torch.testing.assert_close(one, other)
    keep_zone(base, some, "II+III", include=["up"])
    want = base.up.weight + zone(base.up.weight, tuned.up.weight, "II+III")
    torch.testing.assert_close(some.up.weight, want)
    assert torch.equal(some.up.bias, tuned.up.bias)
    assert torch.equal(some.down.weight, tuned.down.weight)
    with pytest.raises(sk.SmileError, match="name: is 'IV', with 'IV'; expected I, II, III, mixed"):
        keep_zone(base, some, "IV")
    with pytest.raises(sk.SmileError, match="finetuned: has no up of model's shape"):
        keep_zone(base, nn.Sequential(nn.Linear(3, 3)), "I")
