"""Policies as values: refused arguments, storage, saved work, and `watch_routing`."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels import SmileLinear, functional
from smile_kernels.cli import app
from smile_kernels.integrations import distributed
from smile_kernels.ops import composed, library
from smile_kernels.routing import RoutingPolicy, get_routing, set_routing, watch_routing
from smile_kernels.routing.policy import block_numbers
from smile_kernels.testing import Problem, assert_close, expectations
from tests.routing.definition import (
    POLICIES,
    SIZES,
    Calls,
    G,
    N,
    R,
    bert,
    by_name,
    definition,
    llama,
    logits,
    t5,
    tokens,
)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("scope", {"scope": "layer"}),
        ("accumulate", {"accumulate": 1}),
        ("lock_after", {"scope": "sequence", "lock_after": 0}),
        ("lock_after", {"scope": "sequence", "lock_after": 2.0}),
        ("lock_after", {"lock_after": 2}),
        ("num_experts_per_tok", {"num_experts_per_tok": 0}),
        ("routing", {"scop": "token"}),
    ],
)
def test_bad_policies_are_named(name, values):
    with pytest.raises(ValueError, match=rf"^(routing: )?{name}: "):
        RoutingPolicy.from_dict(values)


@by_name({name: POLICIES[name] for name in ("sequence+layers, m 2", "causal+layers, lock 1, m 2")})
def test_one_sequence_alone_goes_where_it_goes_in_a_batch(policy):
    model, ids = bert().double(), tokens(2, 5)
    set_routing(model, policy)
    both = logits(model, input_ids=ids)
    for i in range(2):
        torch.testing.assert_close(logits(model, input_ids=ids[i : i + 1]), both[i : i + 1])


def test_models_that_cannot_follow_are_refused_unchanged():
    with pytest.raises(ValueError, match=r"^model: Linear has no SmileLinear"):
        set_routing(nn.Linear(2, 2), RoutingPolicy())
    model = nn.Sequential(SmileLinear(8, 8, 2, 2, 2), SmileLinear(8, 8, 3, 2, 2))
    with pytest.raises(ValueError, match=r"^num_experts_per_tok: is 3; expected at most 2"):
        set_routing(model, RoutingPolicy(num_experts_per_tok=3))
    with pytest.raises(ValueError, match=r"^model: .* \[2, 3\] experts"):
        set_routing(model, POLICIES["sequence"])
    stray = t5()
    stray.lm_head = SmileLinear(16, 50, N, R, G)
    with pytest.raises(ValueError, match=r"^model: lm_head belongs to none of its parts \(T5Stack, T5Stack\)"):
        set_routing(stray, POLICIES["sequence"])
    assert get_routing(model) == RoutingPolicy()
    assert [layer.num_experts_per_tok for layer in model] == [1, 1]
    set_routing(model, RoutingPolicy(num_experts_per_tok=2))
    assert [layer.num_experts_per_tok for layer in model] == [2, 2]


@pytest.mark.parametrize("style", ["ColwiseSmile", "RowwiseSmile"])
def test_layers_split_over_ranks_refuse_a_policy(style):
    model = nn.Sequential(SmileLinear(8, 8, 2, 2, 2))
    set_routing(model, RoutingPolicy("sequence"))
    with pytest.raises(NotImplementedError, match=r"^routing: a layer split over ranks"):
        getattr(distributed, style)().forward(model[0], None, torch.randn(3, 8))


@by_name(POLICIES | {"token": RoutingPolicy()})
def test_policies_survive_their_dict(policy):
    assert RoutingPolicy.from_dict(policy.to_dict()) == policy
    model = bert()
    set_routing(model, policy)
    assert get_routing(model) == policy


@by_name({"sequence+layers, lock 1": POLICIES["sequence+layers, lock 1"], "token": RoutingPolicy()})
def test_checkpoints_carry_the_policy(policy, tmp_path):
    config = tf.BertConfig(**SIZES, intermediate_size=24)
    base, finetuned = tf.BertModel(config), [tf.BertModel(config) for _ in range(3)]
    model, _ = sk.upscale(
        base, finetuned, rank_of_expert=4, rank_of_router=2, num_experts_per_tok=2, routing=policy, progress=False
    )
    model.eval()
    ids = tokens(2, 6)
    want = logits(model, input_ids=ids)
    assert get_routing(model) == policy
    sk.save_pretrained(model, tmp_path / "whole")
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert ("routing" in stored) == (not policy.is_published)
    loaded = [sk.load_pretrained(tmp_path / "whole"), tf.AutoModel.from_pretrained(tmp_path / "whole")]
    loaded.append(sk.load_pretrained(tmp_path / "whole", tf.BertModel(config).eval()))
    other = RoutingPolicy("causal")
    for copied in loaded:
        assert get_routing(copied) == policy
        torch.testing.assert_close(logits(copied, input_ids=ids), want, rtol=1e-4, atol=1e-5)
    for how, copied in zip(("own", "transformers"), loaded):
        set_routing(copied, other)
        (sk.save_pretrained if how == "own" else tf.BertModel.save_pretrained)(copied, tmp_path / how)
        assert get_routing(tf.AutoModel.from_pretrained(tmp_path / how)) == other


def test_command_line_sets_the_policy(tmp_path):
    config = tf.BertConfig(**SIZES, intermediate_size=24)
    for name in ("base", "one", "two"):
        tf.BertModel(config).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("base", "one", "two", "out", "yaml.yml", "again")}
    arguments = ["upscale", "--base", paths["base"], "--expert", paths["one"], "--expert", paths["two"]]
    arguments += ["--rank-of-expert", "2", "--rank-of-router", "2"]
    policy = ["--routing", "sequence", "--accumulate", "--lock-after", "3"]
    result = CliRunner().invoke(app, [*arguments, *policy, "--out", paths["out"]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert get_routing(sk.load_pretrained(paths["out"])) == RoutingPolicy("sequence", True, 3)
    (tmp_path / "yaml.yml").write_text("parameters: {routing: {scope: causal, accumulate: true}}")
    result = CliRunner().invoke(app, ["upscale", paths["yaml.yml"], *arguments[1:], "--out", paths["again"]])
    assert result.exit_code == 0, result.output
    assert get_routing(sk.load_pretrained(paths["again"])) == RoutingPolicy("causal", True)
    result = CliRunner().invoke(app, [*arguments, "--lock-after", "3", "--out", str(tmp_path / "no")])
    assert result.exit_code != 0
    assert "lock_after: is 3" in result.output
    assert not (tmp_path / "no").exists()


def test_the_published_policy_restores_each_layer_s_own_number_of_experts():
    model = nn.Sequential(SmileLinear(6, 6, 4, 2, 2, 1), SmileLinear(6, 6, 4, 2, 2, 2))
    x, before = torch.randn(3, 6), [layer.num_experts_per_tok for layer in model]
    for tensor in (t for layer in model for t in (layer.vh, layer.s, layer.u)):
        nn.init.normal_(tensor)
    want = model(x)
    set_routing(model, RoutingPolicy(num_experts_per_tok=3))
    assert [layer.num_experts_per_tok for layer in model] == [3, 3]
    set_routing(model, RoutingPolicy("sequence", num_experts_per_tok=4))
    set_routing(model, RoutingPolicy())
    assert [layer.num_experts_per_tok for layer in model] == before
    assert torch.equal(model(x), want)


def test_locked_layers_compute_no_scores(monkeypatch):
    model = bert()
    calls = []
    for name in ("evidence", "serve_step"):  # one of which each layer that computes scores calls
        own = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *a, own=own: calls.append(1) or own(*a))
    set_routing(model, POLICIES["sequence+layers, lock 1"])
    logits(model, input_ids=tokens(2, 5))
    assert len(calls) == 6
    model = llama()
    for policy, scored in ((POLICIES["sequence+layers"], 0), (POLICIES["causal+layers, lock 1, m 2"], 7)):
        set_routing(model, policy)
        kv = tf.DynamicCache(config=model.config)
        logits(model, input_ids=tokens(2, 5), past_key_values=kv)
        calls.clear()
        logits(model, input_ids=tokens(2, 1), past_key_values=kv)
        assert len(calls) == scored


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_expert_for_all_tokens(dtype, monkeypatch):
    """The case without grouping of tokens, forward and backward, also for weights other than 1."""
    p = Problem.random(9, 23, 29, 5, 3, 4, dtype=dtype)
    ids, weights = torch.full((9, 1), 3, dtype=torch.int32), torch.rand(9, 1) + 0.5
    dy = torch.randn(9, 29).to(dtype)
    leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
    leaves["weights"] = weights.to(p.s.dtype).requires_grad_()
    options = {"num_experts_per_tok": 1, "rank_of_router": 4}
    y = functional.smile_linear(*p.arguments(), **options, routing=(leaves["weights"], ids), backend="torch")
    got = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy, allow_unused=True)))}
    for name, (want, plain_error) in expectations(p, ids, weights=weights, dy=dy).items():
        assert_close(name, got[name], want, plain_error)
    monkeypatch.setattr(composed, "EVERY_TOKEN", dict.fromkeys(composed.EVERY_TOKEN, 0))  # for any size of the problem
    for chosen, groups in ((ids, False), (torch.arange(9, dtype=torch.int32)[:, None] % 5, True)):
        with torch.no_grad(), torch.profiler.profile() as profile:
            y = functional.smile_linear(*p.arguments(), **options, routing=(leaves["weights"], chosen), backend="torch")
        assert_close("y", y, *expectations(p, chosen, weights=weights)["y"])
        names = {event.name for event in profile.events()}
        assert bool(names & {"aten::sort", "aten::index_select", "aten::index_add_"}) == groups


@by_name(POLICIES | {"token": RoutingPolicy()})
def test_watching_counts_the_choices_and_changes_nothing(policy):
    model = bert()
    set_routing(model, policy)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    want = logits(model, input_ids=ids, attention_mask=mask)
    with Calls(model) as calls, watch_routing(model) as counts:
        torch.testing.assert_close(logits(model, input_ids=ids, attention_mask=mask), want)
    real = mask.bool()
    if not policy.is_published:
        choices = [ids for _, ids in definition(calls, real.tolist(), policy)]
    else:
        choices = [functional.route(x, c.vh, num_experts_per_tok=1, rank_of_router=G)[1] for c, x, _ in calls]
    names = {layer: name for name, layer in model.named_modules()}
    for (layer, _, _), chosen in zip(calls, choices, strict=True):
        assert torch.equal(counts[names[layer]], chosen[..., 0][real].bincount(minlength=N))
    model(input_ids=ids)
    assert sum(int(count.sum()) for count in counts.values()) == 9 * len(calls), "it counts only while it is open"


def test_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "routing.py"
    monkeypatch.setattr("sys.argv", ["routing.py", "--plot", str(tmp_path / "routing.png")])
    runpy.run_path(str(example), run_name="__main__")
    shares = [float(line.split(":")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) == 5
    assert shares[0] < min(shares[1:]), "remembering must help"
    assert (tmp_path / "routing.png").stat().st_size > 10_000


def test_blocks_are_read_from_names():
    names = ["embed", "model.layers.0.q", "model.layers.0.experts.7.up", "model.layers.4.q", "model.norm", "head"]
    assert list(block_numbers(names).values()) == [0, 0, 0, 1, 1, 1]
    assert list(block_numbers(["a", "b.c"]).values()) == [0, 1], "without numbers each layer is a block"


def test_the_layers_own_m_comes_back():
    model = nn.Sequential(SmileLinear(8, 8, 3, 2, 2, num_experts_per_tok=2))
    for m in (1, 3):
        set_routing(model, RoutingPolicy(num_experts_per_tok=m))
        assert model[0].num_experts_per_tok == m
    set_routing(model, RoutingPolicy())
    assert model[0].num_experts_per_tok == 2


def test_an_unfit_policy_is_refused_before_anything_is_replaced():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    finetuned = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"^num_experts_per_tok: is 3; expected at most 2"):
        sk.upscale(
            base,
            finetuned,
            rank_of_expert=2,
            rank_of_router=2,
            routing=RoutingPolicy("sequence", num_experts_per_tok=3),
            inplace=True,
            progress=False,
        )
    assert [type(layer) for layer in base] == [nn.Linear, nn.Linear]


@by_name(POLICIES)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_an_empty_batch_is_no_error(policy, shape):
    model = nn.Sequential(*(SmileLinear(8, 8, N, R, G) for _ in range(3)))
    set_routing(model, policy)
    assert model(torch.empty(shape)).shape == shape
