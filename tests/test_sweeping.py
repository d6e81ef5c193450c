"""Sweeps: a truncated model equals one fused at its ranks, the given model is restored, bad input is refused first."""

import copy
import json
import math
import sys
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels.cli import app
from smile_kernels.nn import smile_layers
from tests.integrations import tiny_models
from tests.test_all_or_nothing import fused, same, state
from tests.upscaling.checkpoints import Net

IDS = torch.arange(8).view(2, 4)
RANKS = {"rank_of_expert": [1, 3, 8], "rank_of_router": [1, 2, 4]}


@pytest.fixture
def net(models) -> nn.Module:
    return sk.upscale(models[0], models[1:], rank_of_expert=8, rank_of_router=4, progress=False)[0].eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_each_setting_equals_a_model_that_is_fused_at_it(models, dtype):
    base, *tuned = (model.to(dtype) for model in models)
    model = sk.upscale(base, tuned, rank_of_expert=8, rank_of_router=4, progress=False)[0]
    seen = []

    def score(given: nn.Module) -> float:
        seen.append((given(IDS), copy.deepcopy(given)))
        return 1.0

    told = []
    found = sk.sweep(model, score, **RANKS, num_experts_per_tok=[2, 1], progress=lambda *at: told.append(at))
    assert told == [("settings", done, 18) for done in range(19)]
    sizes = {(s.num_experts_per_tok, s.rank_of_router, s.rank_of_expert): s.parameters for s in found.settings}
    assert list(sizes) == list(product((1, 2), (1, 2, 4), (1, 3, 8)))
    order = list(product((1, 2, 4), (1, 3, 8), (1, 2)))  # of the calls
    whole = sum(p.numel() for p in base.parameters())
    for (g, r, m), (output, given) in zip(order, seen, strict=True):
        ranks = {"rank_of_expert": r, "rank_of_router": g, "num_experts_per_tok": m}
        want, _ = sk.upscale(base, tuned, **ranks, progress=False)
        torch.testing.assert_close(output, want(IDS))
        for name, layer in smile_layers(want).items():
            other = given.get_submodule(name)
            assert str(other) == str(layer)
            for part in ("vh", "s", "u", "expert_bias"):
                torch.testing.assert_close(getattr(other, part), getattr(layer, part))
        assert sizes[m, g, r] == pytest.approx(sum(p.numel() for p in want.parameters()) / whole)


def test_policies_calibrated_ones_at_each_rank_of_the_router():
    base = tiny_models.build("BertForSequenceClassification")
    tuned = [tiny_models.fine_tuned(base, seed) for seed in (1, 2)]
    options = {"exclude": ["classifier"], "progress": False}
    model, _ = sk.upscale(base, tuned, rank_of_expert=3, rank_of_router=2, **options)
    policies = {
        "published": sk.RoutingPolicy(),
        "causal": sk.RoutingPolicy("causal", accumulate=True, calibrated=True),
    }
    priors = {}

    def score(given: nn.Module) -> dict[str, float]:
        layer = next(iter(smile_layers(given).values()))
        priors.setdefault(layer.rank_of_router, set()).add(layer.router_prior)
        told = sk.get_routing(given)
        return {"g": layer.rank_of_router, "r": layer.rank_of_expert, "causal": told.scope == "causal"}

    found = sk.sweep(model, score, rank_of_expert=[1, 3], rank_of_router=[1, 2], routing=policies)
    grid = product(("published", "causal"), (1, 2), (1, 3))
    assert [(s.routing, s.scores) for s in found.settings] == [
        (name, {"g": g, "r": r, "causal": name == "causal"}) for name, g, r in grid
    ]
    assert next(iter(smile_layers(model).values())).router_prior is None
    for g in (1, 2):
        want, _ = sk.upscale(base, tuned, rank_of_expert=3, rank_of_router=g, calibrate=True, **options)
        (prior,) = priors[g]  # measured once
        torch.testing.assert_close(prior, next(iter(smile_layers(want).values())).router_prior)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored(fails):
    model = fused()
    sk.set_routing(model, sk.RoutingPolicy("sequence", num_experts_per_tok=2))
    before = state(model)
    calls = []

    def score(given: nn.Module) -> float:
        calls.append(given)
        if fails and len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    if fails:
        with pytest.raises(KeyboardInterrupt):
            sk.sweep(model, score)
    else:
        sk.sweep(model, score)
    after = state(model)
    after[3][:] = [(m, policy) for (m, _), (_, policy) in zip(after[3], before[3])]  # another object of the same policy
    assert same(after, before)


def test_results_are_written_after_each_setting(tmp_path, net):
    file, counts = tmp_path / "a.json", []

    def score(model: nn.Module) -> dict[str, float]:
        counts.append(len(json.loads(file.read_text())["settings"]) if file.exists() else 0)
        return {"one": len(counts), "two": math.inf if len(counts) == 2 else 3.0}

    found = sk.sweep(net, score, rank_of_expert=[2, 4], rank_of_router=[1, 2], file=file)
    assert counts == [0, 1, 2, 3]
    rows = json.loads(file.read_text())["settings"]
    assert [row["scores"] for row in rows][:2] == [{"one": 1, "two": 3}, {"one": 2, "two": None}]
    assert [row["score"] for row in rows] == [2, None, 3, 3.5]
    assert [(row["rank_of_expert"], row["rank_of_router"]) for row in rows] == [(2, 1), (4, 1), (2, 2), (4, 2)]
    assert rows[0]["parameters"] == found.settings[0].parameters > 1
    assert len(str(found).splitlines()) == 5
    found.plot(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(f"{setting.parameters:.2f}×" in svg for setting in found.settings)


def test_defaults_are_the_models_ranks_their_halves_and_quarters(net):
    found = sk.sweep(net, lambda model: torch.tensor(1)).settings
    assert {s.rank_of_expert for s in found} == {2, 4, 8}
    assert {s.rank_of_router for s in found} == {1, 2, 4}
    assert {(s.num_experts_per_tok, s.routing) for s in found} == {(1, "published")}


def test_a_layer_of_a_smaller_rank_keeps_it(models):
    low = copy.deepcopy(models[0])
    low.up.weight.data += 0.1 * torch.outer(torch.randn(24), torch.randn(16))
    low.down.weight.data += 0.1 * torch.randn(16, 24)
    model, _ = sk.upscale(models[0], [low, low], rank_of_expert=-1, rank_of_router=1, progress=False)
    ranks = []
    sk.sweep(
        model,
        lambda given: ranks.append((given.up.rank_of_expert, given.down.rank_of_expert)) or 0.0,
        rank_of_expert=[1, 5, 16],
    )
    assert ranks == [(1, 1), (1, 5), (1, 16)]


BAD = [
    ({"rank_of_expert": [2, 9]}, r"rank_of_expert\[1\]: is 9; expected 1 to 8, the rank that the model was fused with"),
    ({"rank_of_router": [0]}, r"rank_of_router\[0\]: is 0; expected 1 to 4, the rank that"),
    ({"rank_of_router": []}, "rank_of_router: is empty; expected one value or more"),
    ({"num_experts_per_tok": [4]}, r"num_experts_per_tok\[0\]: is 4; expected 1 to 3, the number of experts"),
    ({"num_experts_per_tok": []}, "num_experts_per_tok: is empty"),
    ({"rank_of_expert": 3}, "rank_of_expert: is 3; expected a list"),
    ({"routing": {}}, "routing: is empty; expected one policy or more"),
    ({"routing": {"a": "token"}}, r"routing\['a'\]: is 'token'; expected a name and a RoutingPolicy"),
    ({"routing": {"a": sk.RoutingPolicy(num_experts_per_tok=2)}}, r"routing\['a'\]: sets num_experts_per_tok 2;"),
    ({"routing": {"a": sk.RoutingPolicy(calibrated=True)}}, "has no input that can be generated|Net"),
    ({"routing": {"a": sk.RoutingPolicy(top_p=0.5)}}, "top_p: is 0.5 with num_experts_per_tok 1"),
    ({"file": "none/a.json"}, "file: is 'none/a.json'; expected a file in a folder that exists"),
    ({"file": "a\0"}, r"file: is 'a\\x00'; expected a path that a file can have"),
    ({"file": "a\ud800"}, r"file: is 'a\\ud800'; expected a path that a file can have"),
    ({"model": Net()}, "model: Net has no SmileLinear; expected a model from upscale"),
    ({"score": 3}, "score: is 3; expected"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: "")
def test_bad_input_is_refused_before_work(net, changes, message):
    before = state(net)
    arguments = {"model": net, "score": lambda model: pytest.fail("was called")} | changes
    with pytest.raises(sk.SmileError, match=message):
        sk.sweep(**arguments)
    assert same(state(net), before)


NOT_SCORES = [
    "high", None, {}, {1: 2.0}, {"a": "b"}, torch.ones(2), torch.zeros((), device="meta"), torch.tensor(1j), 10**400,
    np.ones(2), {"a": np.ones(3)}, np.array("3"), np.complex64(1),
]  # fmt: skip


@pytest.mark.parametrize("returned", NOT_SCORES, ids=str)
def test_what_is_not_a_score_is_refused(net, returned):
    before = state(net)
    with pytest.raises(sk.SmileError, match=r"score: returned .*; expected"):
        sk.sweep(net, lambda model: returned)
    assert same(state(net), before)


def test_other_tasks_than_before_are_refused(net):
    scores = iter([{"a": 1.0}, {"b": 1.0}])
    with pytest.raises(sk.SmileError, match=r"the tasks \['b'\]; expected those of the first setting, \['a'\]"):
        sk.sweep(net, lambda model: next(scores))


def test_a_router_with_rows_of_its_own_is_refused(models):
    model, _ = sk.upscale(models[0], models[1:], rank_of_expert=4, router="norm", progress=False)
    with pytest.raises(sk.SmileError, match="the router of up has rows of its own, as of router 'norm' or training"):
        sk.sweep(model, lambda model: 0.0)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder with a SMILE checkpoint and scoring functions, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = tiny_models.build("LlamaForCausalLM")
    tuned = [tiny_models.fine_tuned(base, seed) for seed in (1, 2)]
    model, _ = sk.upscale(base, tuned, rank_of_expert=4, rank_of_router=2, progress=False)
    sk.save_pretrained(model, tmp_path / "fused")
    (tmp_path / "json.py").write_text(
        "import torch\n\n\ndef score(model):\n    with torch.no_grad():\n"
        "        return {'a': model(torch.arange(9)[None]).logits.mean(), 'b': 2}\n\n\n"
        "def broken(model):\n    raise KeyError('there')\n"
        "def leaves(model):\n    raise SystemExit(0)\n"
    )
    (tmp_path / "scoring_of_a_sweep.py").write_text("def one(model):\n    return 1.0\n")
    return tmp_path


def test_the_command(checkpoint):
    command = ["sweep", "fused", "--score", "json.py:score", "--json", "a.json", "--plot", "a.png"]
    grid = ["--rank-of-expert", "1", "--rank-of-expert", "4"]
    grid += ["--num-experts-per-tok", "1", "--num-experts-per-tok", "2"]
    policies = ["--routing", "token", "--routing", '{"scope": "sequence", "accumulate": true}']
    result = CliRunner().invoke(app, [*command, *grid, *policies])
    assert result.exit_code == 0, result.output
    assert "settings: 16 of 16" in result.output
    rows = json.loads((checkpoint / "a.json").read_text())["settings"]
    assert len(rows) == 16
    assert {row["routing"] for row in rows} == {"token", policies[-1]}
    assert len({row["scores"]["a"] for row in rows}) > 8
    assert (checkpoint / "a.png").stat().st_size > 5000
    result = CliRunner().invoke(app, ["sweep", "fused", "--score", "scoring_of_a_sweep:one", "--json", "a.json"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "json.py"], "score: is 'json.py'; expected MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["--score", "no.py:score"], "score: no.py: no such file; expected a Python file"),
        (["--score", "json.py:other"], "score: json.py has no function 'other'; expected one that takes the model"),
        (["--score", "no_such_module_here:f"], "score: no_such_module_here cannot be imported (ModuleNotFoundError"),
        (["--score", "json.py:broken"], "score: json.py:broken raised KeyError: 'there'; expected a score"),
        (["--score", "json.py:leaves"], "score: json.py:leaves raised SystemExit: 0; expected a score"),
        (["--routing", "tokens"], "scope: is 'tokens'; expected one of 'token', "),
        (["--routing", "{"], "routing: is not JSON (Expecting property name"),
        (["--routing", '{"scopes": 1}'], "routing: unknown key 'scopes'; expected scope"),
        (["--rank-of-expert", "5"], "rank_of_expert[0]: is 5; expected 1 to 4"),
        (["--plot", "a.txt"], "plot: is 'a.txt'; expected a name that ends with"),
        (["--routing", '{"a":' * 50_000], "routing: cannot be read as JSON (nested too deeply)"),
        (["--json", "no/a.json"], "json: is 'no/a.json'; expected a file in a folder that exists"),
        (["--json", "json.py"], "json: is 'json.py', an input; expected a file outside of it"),
        (["--json", "a" * 242], "expected a name of at most 241 bytes"),
        (["--json", "a.png", "--plot", "./a.png"], "json: is 'a.png', as plot is; expected another file"),
    ],
    ids=lambda value: "",
)
def test_bad_options_are_refused(checkpoint, options, message):
    score = [] if "--score" in options else ["--score", "json.py:score"]
    result = CliRunner().invoke(app, ["sweep", "fused", *score, *options])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " "), result.output
    assert "this is a bug" not in result.output
