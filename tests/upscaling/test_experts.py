"""add_expert, replace_expert, remove_expert: equal to `upscale` with the same experts, or no change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import smile_kernels as sk
from smile_kernels.integrations.peft import LowRankDelta, ModuleDelta
from smile_kernels.nn import smile_layers
from tests.integrations import tiny_models
from tests.upscaling.checkpoints import RANKS, Net

NAMES = ["a", "b", "c"]


def upscale(base: nn.Module, experts: list, names: list[str] | None = None, **options) -> nn.Module:
    return sk.upscale(base, experts, expert_names=names, progress=False, **(RANKS | options))[0]


def assert_same(got: nn.Module, want: nn.Module) -> None:
    """Names, sizes and tensors; trailing zeros of experts without changes are ignored."""
    mine, theirs = smile_layers(got), smile_layers(want)
    assert mine.keys() == theirs.keys()
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    for name, layer in theirs.items():
        for field in ("num_local_experts", "num_experts_per_tok", "rank_of_expert", "rank_of_router", "expert_names"):
            assert getattr(mine[name], field) == getattr(layer, field), field


def state(model: nn.Module) -> dict:
    layers = smile_layers(model)
    return dict(model.state_dict()) | {
        name: (layer.num_local_experts, layer.expert_names) for name, layer in layers.items()
    }


@pytest.mark.parametrize("named", [True, False], ids=["named", "numbers"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts_per_tok": 2},
        {"router": "norm", "rank_of_router": None},
        {"router": "arrow", "rank_of_router": None},
    ],
    ids=["smile", "m2", "norm", "arrow"],
)
def test_the_model_of_these_experts(options, named, models):
    base, *experts = models
    names = NAMES if named else None
    ids = torch.randint(13, (2, 7))
    whole = upscale(base, experts, names, **options)

    model = upscale(base, experts[:2], names and names[:2], **options)
    report = sk.add_expert(model, experts[2], name=names and names[2])
    assert_same(model, whole)
    assert torch.equal(model(ids), whole(ids))
    assert list(report.expert_names) == (["c"] if named else [])
    assert [len(layer.energy) for layer in report.layers] == [1, 1]
    assert [lost.name for lost in report.lost] == ["embed.weight"]

    sk.remove_expert(model, "b" if named else 1)
    rest = upscale(base, [experts[0], experts[2]], names and ["a", "c"], **options)
    assert_same(model, rest)
    sk.replace_expert(model, "a" if named else 0, experts[1], name=names and "b")
    assert_same(model, upscale(base, [experts[1], experts[2]], names and ["b", "c"], **options))
    assert torch.equal(model(ids), upscale(base, [experts[1], experts[2]], **options)(ids))


def test_adapters_of_higher_and_lower_rank_with_a_bias_of_one(models):
    base, first, _, _ = models
    first.up.bias = nn.Parameter(base.up.bias.detach().clone())
    deltas = {
        "up": ModuleDelta(LowRankDelta(torch.randn(24, 2), torch.randn(2, 16), 0.5), torch.randn(24)),
        "down": ModuleDelta(LowRankDelta(torch.randn(16, 7), torch.randn(7, 24), 0.1)),
    }
    model = upscale(base, [first])
    assert model.up.expert_bias is None
    report = sk.add_expert(model, deltas)
    assert_same(model, upscale(base, [first, deltas]))
    errors = {layer.name: layer.error[0] for layer in report.layers}
    assert errors["up"] < 1e-6 < errors["down"]  # rank 7 in 4
    assert not model.up.s[1, 2:].any()
    sk.remove_expert(model, 1)
    assert_same(model, upscale(base, [first]))


def test_the_folder_of_an_adapter_and_of_a_model_name_their_expert(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_models.chat_model(tiny_models.chat_tokenizer())
    tuned = tiny_models.fine_tuned(base, 1)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, p in lora.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn_like(p)
    lora.save_pretrained(tmp_path / "maths")
    tuned.save_pretrained(tmp_path / "code")
    options = {"exclude": ["lm_head"]}
    model = upscale(base, [tiny_models.fine_tuned(base, 2)], ["chat"], **options).eval()
    lora.save_pretrained(tmp_path / "both")
    tuned.save_pretrained(tmp_path / "both")
    with pytest.raises(sk.SmileError, match=r"both has adapter_config.json and model.safetensors; expected"):
        sk.add_expert(model, tmp_path / "both")
    sk.add_expert(model, tmp_path / "maths")
    sk.add_expert(model, str(tmp_path / "code"))
    whole = upscale(
        base,
        [tiny_models.fine_tuned(base, 2), sk.integrations.peft.adapter_deltas(tmp_path / "maths", base), tuned],
        ["chat", "maths", "code"],
        **options,
    ).eval()
    assert_same(model, whole)
    ids = torch.randint(5, 50, (2, 9))
    want = whole(ids).logits
    for save in (sk.save_pretrained, lambda model, folder: model.save_pretrained(folder)):
        save(model, tmp_path / f"saved-{save.__name__.strip('<>')}")
    for folder in tmp_path.glob("saved-*"):
        loaded = type(base).from_pretrained(folder)
        assert_same(loaded, whole)
        torch.testing.assert_close(loaded(ids).logits, want)
        sk.remove_expert(loaded, "maths")
        assert loaded.config.quantization_config.expert_names == ("chat", "code")


def test_conv1d_models(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    experts = [tiny_models.fine_tuned(base, seed) for seed in range(2)]
    model = upscale(base, experts[:1])
    sk.add_expert(model, experts[1])
    assert_same(model, upscale(base, experts))
    experts[1].save_pretrained(tmp_path / "tuned")
    with pytest.raises(sk.SmileError, match="stores layers transposed"):
        sk.add_expert(model, tmp_path / "tuned")


def test_policies_go_on_and_old_caches_do_not(models):
    base = tiny_models.chat_model(tiny_models.chat_tokenizer())
    experts = [tiny_models.fine_tuned(base, seed) for seed in range(3)]
    options = {"exclude": ["lm_head"], "routing": sk.RoutingPolicy("causal", accumulate=True)}
    model, whole = (upscale(base, some, **options).eval() for some in (experts[:2], experts))
    ids = torch.randint(5, 50, (2, 9))
    cache = model(ids, use_cache=True).past_key_values
    sk.add_expert(model, experts[2])
    assert sk.get_routing(model) == options["routing"]
    assert torch.equal(model(ids).logits, whole(ids).logits)
    with pytest.raises(RuntimeError, match="cache"):
        model(ids[:, :1], past_key_values=cache)
    sk.set_routing(model, sk.RoutingPolicy())
    sk.calibrate(model)
    sk.remove_expert(model, 0)
    assert all(layer.router_prior is None for layer in smile_layers(model).values())


def refused(model: nn.Module, message: str, call) -> None:
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state(model).items()}
    with pytest.raises(sk.SmileError, match=message):
        call(model)
    after = state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, new: sk.add_expert(model, new), r"name: is not given; expected a name, as 'a' is another"),
        (lambda model, new: sk.add_expert(model, new, name="a"), "'a' is given twice"),
        (lambda model, new: sk.add_expert(model, Net(32), name="c"), r"tensor 'up.weight' has shape \[32, 16\]"),
        (lambda model, new: sk.add_expert(model, new.double(), name="c"), "is torch.float64; expected the base's"),
        (lambda model, new: sk.add_expert(model, model, name="c"), "expert: up is a SmileLinear; expected"),
        (
            lambda model, new: sk.add_expert(model, nn.Linear(2, 2), name="c"),
            "expert: .* is a NoneType; expected a linear",
        ),
        (lambda model, new: sk.replace_expert(model, "d", new), "old: is 'd'; expected one of the experts 'a', 'b'"),
        (lambda model, new: sk.replace_expert(model, 0, new, name="b"), "'b' is given twice"),
        (lambda model, new: sk.remove_expert(model, 2), "old: is 2; expected 0 to 1"),
    ],
    ids=["no-name", "taken", "shape", "dtype", "smile", "kind", "unknown", "renamed", "number"],
)
def test_what_does_not_fit_changes_nothing(call, message, models):
    base, first, second, third = models
    refused(upscale(base, [first, second], ["a", "b"]), message, lambda model: call(model, third))


def test_states_that_do_not_allow_it(models):
    base, first, second, third = models
    model = upscale(base, [first, second])
    refused(model, "expert: changes none of the SMILE layers", lambda m: sk.add_expert(m, base))
    refused(model, "name: is 'x', and the other experts have no names", lambda m: sk.add_expert(m, third, name="x"))
    refused(model, "name: is 'x', and the experts have no names", lambda m: sk.replace_expert(m, 0, third, name="x"))
    with sk.routing_override(model, 1):
        refused(model, "a routing_override is open", lambda m: sk.add_expert(m, third))
    both = upscale(base, [first, second], num_experts_per_tok=2)
    refused(both, "a token has all 2 experts", lambda m: sk.remove_expert(m, 0))
    sk.remove_expert(model, 0)
    refused(model, "the only expert", lambda m: sk.remove_expert(m, 0))
    for layer in smile_layers(both).values():
        layer.router_prior = torch.zeros(2)
    sk.set_routing(both, sk.RoutingPolicy(accumulate=True, calibrated=True))
    refused(both, "follows a calibrated routing policy", lambda m: sk.replace_expert(m, 0, third))
    with pytest.raises(sk.SmileError, match="has no SmileLinear"):
        sk.add_expert(base, third)

    bound = upscale(base, [first, second])
    parametrize.register_parametrization(bound.up, "u", torch.nn.Identity())
    refused(bound, "up is parametrized; expected plain parameters", lambda m: sk.add_expert(m, third))
    foreign = upscale(base, [first, second], router="norm", rank_of_router=None)
    foreign.up.router.data[0] *= 2
    refused(foreign, "the router of up has rows of its own", lambda m: sk.add_expert(m, third))
    sk.remove_expert(foreign, 0)
    assert foreign.up.router.shape[0] == 1


def test_a_failure_half_way_leaves_the_model_as_it_was(models, monkeypatch):
    base, first, second, third = models
    model = upscale(base, [first, second])

    def fail(_):
        raise sk.SmileError("half way: fails; expected no change")

    monkeypatch.setattr("smile_kernels.upscaling.experts.describe_as_smile", fail)
    refused(model, "half way", lambda m: sk.add_expert(m, third))
    assert model.up.num_local_experts == 2


def test_what_stays_frozen_stays_frozen(models):
    base, first, second, third = models
    model = upscale(base, [first, second])
    model.up.vh.requires_grad_(False)
    sk.add_expert(model, third)
    assert not model.up.vh.requires_grad
    assert model.up.u.requires_grad
    model(torch.randint(13, (2, 5))).sum().backward()
    assert model.up.u.grad.shape[0] == 3


def test_an_unchanged_layer_warns_of_what_is_lost(models):
    base, first, _, third = models
    model = upscale(base, [first], exclude=["down"])
    with pytest.warns(UserWarning, match=r"down.weight .*a layer without experts.*upscale\) takes them up"):
        report = sk.add_expert(model, third)
    assert "down.weight" in {lost.name for lost in report.lost}
    assert not isinstance(model.down, sk.SmileLinear)
