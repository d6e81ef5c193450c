"""upscale(): models with linear layers of every kind and at every place, compared with the fine-tuned models."""

import contextlib
import copy
import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import smile_kernels as sk
from smile_kernels.integrations.peft import LowRankDelta, ModuleDelta
from smile_kernels.nn import smile_layers
from smile_kernels.upscaling import upscale, upscale_checkpoints

RANKS = {"rank_of_expert": 4, "rank_of_router": 2, "progress": False}


@torch.no_grad()
def finetuned(base: nn.Module, seed: int, only: str = "", size: float = 0.3) -> nn.Module:
    """A copy in which the parameters with `only` in their name are changed."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    for name, p in model.named_parameters():
        if only in name:
            p += (size * p.std(correction=0).clamp_min(0.1) * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return model


@contextlib.contextmanager
def routed_to(model: nn.Module, expert: int):
    """Every SMILE layer sends every token to one expert."""

    def choose(layer, args, kwargs):
        weights = torch.zeros(*args[0].shape[:-1], layer.num_local_experts, dtype=layer.s.dtype)
        weights[..., expert] = 1
        return args, {**kwargs, "routing_weights": weights}

    hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in smile_layers(model).values()]
    yield
    for hook in hooks:
        hook.remove()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict(keep_vars=False).items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())


class Mlp(nn.Module):
    def __init__(self, widths: list[int], bias: list[bool], dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=with_bias, dtype=dtype) for a, b, with_bias in zip(widths, widths[1:], bias)
        )
        self.scale = nn.Parameter(torch.ones(widths[0], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_full_rank_and_true_routing_reproduce_each_finetuned_model(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = draw(st.lists(st.integers(1, 24), min_size=2, max_size=4))
    bias = draw(st.lists(st.booleans(), min_size=len(widths) - 1, max_size=len(widths) - 1))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    base = Mlp(widths, bias, dtype)
    n = draw(st.integers(1, 4))
    experts = [finetuned(base, seed, only="layers") for seed in range(n)]
    inplace = draw(st.booleans())
    before = [state(m) for m in (base, *experts)]

    model, report = upscale(
        base,
        experts,
        rank_of_expert=-1,
        rank_of_router=1,
        num_experts_per_tok=draw(st.integers(1, n)),
        inplace=inplace,
        progress=False,
    )

    assert (model is base) == inplace
    assert unchanged(base, before[0]) or inplace
    assert all(unchanged(m, b) for m, b in zip(experts, before[1:]))
    assert [layer.name for layer in report.layers] == [f"layers.{i}" for i in range(len(bias))]
    assert len(smile_layers(model)) == len(bias)
    x = torch.randn(5, widths[0], dtype=dtype)
    for i, expert in enumerate(experts):
        with routed_to(model, i), torch.no_grad():
            got = model(x).double()
        exact = copy.deepcopy(expert).double()(x.double())
        plain = (expert(x).double() - exact).abs().max()
        # The factors of a difference are rounded to the weight's dtype once more, over every layer.
        slack = 8 * len(bias) * torch.finfo(dtype).eps * max(widths) ** 0.5
        assert (got - exact).abs().max() <= 2 * plain + slack


def test_routes_like_the_layers_themselves():
    base = Mlp([16, 12, 8], [True, False], torch.float32)
    experts = [finetuned(base, seed, only="layers") for seed in range(3)]
    options = {"rank_of_expert": 3, "rank_of_router": 2, "num_experts_per_tok": 2}
    model, _ = upscale(base, experts, **options, progress=False)
    for i, layer in enumerate(model.layers):
        alone = sk.SmileLinear.from_linears(base.layers[i], [e.layers[i] for e in experts], **options)
        for name, tensor in alone.state_dict().items():
            assert torch.equal(tensor, layer.state_dict()[name]), name
        assert (layer.rank_of_expert, layer.rank_of_router, layer.num_experts_per_tok) == (3, 2, 2)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["*", "layers.?", "layers.[01]", "layers.2"]), max_size=2),
    st.lists(st.sampled_from(["layers.0", "*.1", "other"]), max_size=2),
    st.sampled_from(["base", "average"]),
)
def test_include_exclude_and_what_remains(include, exclude, remaining):
    base = Mlp([6, 7, 8, 5], [True, True, False], torch.float32)
    experts = [finetuned(base, seed) for seed in range(2)]
    chosen = {0, 1, 2} if not include or set(include) & {"*", "layers.?"} else set()
    chosen |= ({0, 1} if "layers.[01]" in include else set()) | ({2} if "layers.2" in include else set())
    chosen -= {i for i, pattern in enumerate(["layers.0", "*.1"]) if pattern in exclude}
    options = {"include": include or None, "exclude": exclude, "remaining": remaining, **RANKS}
    if not chosen:
        with pytest.raises(ValueError, match=r"include, exclude: .* leaves none of the 3 linear layers"):
            upscale(base, experts, **options)
        return
    model, report = upscale(base, experts, **options)
    assert set(smile_layers(model)) == {f"layers.{i}" for i in chosen} == {layer.name for layer in report.layers}
    for name, tensor in base.state_dict().items():
        kept = remaining == "base" or name.startswith(tuple(f"layers.{i}." for i in chosen))
        mean = (experts[0].state_dict()[name] + experts[1].state_dict()[name]) / 2
        torch.testing.assert_close(model.state_dict()[name], tensor if kept else mean)


def test_rank_as_a_share_of_the_energy_of_each_layer():
    base = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 25))
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert[0].weight += torch.randn(20, 3) @ torch.randn(3, 30)
        expert[1].weight += torch.randn(25, 20)
    model, report = upscale(base, [expert], rank_of_expert=0.99, rank_of_router=1, progress=False)
    for i, layer in enumerate(report.layers):
        energy = torch.linalg.svdvals((expert[i].weight - base[i].weight).detach().double()).square()
        rank = int((energy.cumsum(0) / energy.sum() < 0.99).sum()) + 1
        assert layer.rank == model[i].rank_of_expert == rank
        assert layer.energy[0] == pytest.approx(energy[:rank].sum().item() / energy.sum().item(), abs=1e-5)
        assert layer.error[0] == pytest.approx((1 - layer.energy[0]) ** 0.5, abs=1e-5)
    assert model[0].rank_of_expert <= 3 < model[1].rank_of_expert


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.first(self.embed(ids)).relu()))


def test_the_average_takes_in_persistent_buffers():
    base = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    base.register_buffer("step", torch.zeros(1), persistent=False)
    experts = [finetuned(base, seed) for seed in range(2)]
    for i, expert in enumerate(experts):
        expert[1].running_mean += i + 1
        expert.step += 7
    kept, _ = upscale(base, experts, remaining="base", **RANKS)
    averaged, _ = upscale(base, experts, remaining="average", **RANKS)
    assert torch.equal(kept[1].running_mean, base[1].running_mean)
    torch.testing.assert_close(averaged[1].running_mean, torch.full((5,), 1.5))
    assert torch.equal(averaged[1].num_batches_tracked, base[1].num_batches_tracked)
    assert averaged.step.item() == 0


@pytest.mark.parametrize("remaining", ["base", "average"])
@pytest.mark.parametrize("exclude", [[], ["head"]], ids=["head", "no-head"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_tied_weights_and_shared_layers_stay_so(inplace, exclude, remaining):
    base = Tied()
    experts = [finetuned(base, seed) for seed in range(2)]
    model, report = upscale(base, experts, exclude=exclude, remaining=remaining, inplace=inplace, **RANKS)
    assert model.first is model.again
    assert model.head.weight is model.embed.weight
    assert isinstance(model.first, sk.SmileLinear)
    assert isinstance(model.head, nn.Linear if exclude else sk.SmileLinear)
    assert [layer.name for layer in report.layers] == ["first", "head"][: 2 - len(exclude)]
    if not exclude:
        full, _ = upscale(Tied(), experts, rank_of_expert=-1, rank_of_router=1, progress=False)
        assert full.head.weight is full.embed.weight


def encoder_layer(layer: nn.TransformerEncoderLayer, x: Tensor, padding: Tensor | None) -> Tensor:
    """The output of a post-norm nn.TransformerEncoderLayer, computed by calling its parts."""
    attended = layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    x = layer.norm1(x + attended)
    return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("wrapped", ["encoder", "layer"])
@torch.no_grad()
def test_pytorch_encoder_computes_the_experts_in_eval_mode(wrapped, padded):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    base = (nn.TransformerEncoder(layer, 2) if wrapped == "encoder" else nn.Sequential(layer)).eval()
    experts = [finetuned(base, seed, only="linear") for seed in range(3)]
    model, report = upscale(base, experts, exclude=["*.out_proj"], **RANKS)
    layers = model.layers if wrapped == "encoder" else model
    assert len(smile_layers(model)) == len(report.layers) == 2 * len(layers)
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]]) if padded else None
    want = x
    for layer in layers:
        want = encoder_layer(layer, want, padding)
    assert not any(module.training for module in model.modules())
    got = model(x, src_key_padding_mask=padding) if wrapped == "encoder" else layers[0](x, src_key_padding_mask=padding)
    real = torch.ones(3, 5, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    plain = base(x, src_key_padding_mask=padding) if wrapped == "encoder" else base[0](x, src_key_padding_mask=padding)
    assert (got - plain)[real].abs().max() > 0.01


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_attention_that_never_calls_its_projection_is_refused(inplace):
    base = nn.TransformerEncoderLayer(16, 2, 24)
    before = state(base)
    moved = finetuned(base, 0, only="out_proj.weight")
    adapter = {"self_attn.out_proj": ModuleDelta(LowRankDelta(torch.randn(16, 2), torch.randn(2, 16), 1.0))}
    for experts in ([moved], [copy.deepcopy(base), moved], [copy.deepcopy(base), adapter]):
        with pytest.raises(ValueError, match=r"model: self_attn\.out_proj cannot have experts, .* exclude"):
            upscale(base, experts, inplace=inplace, strict=True, **RANKS)
    assert unchanged(base, before)
    # If no expert changed it, nothing is refused.
    model, report = upscale(base, [finetuned(base, 0, only="linear")], inplace=inplace, **RANKS)
    assert {layer.name: bool(layer.skipped) for layer in report.layers} == {
        "self_attn.out_proj": True,
        "linear1": False,
        "linear2": False,
    }
    assert model.self_attn.out_proj is not None


@torch.no_grad()
def test_conv1d_of_transformers():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    base = transformers.GPT2LMHeadModel(config).double().eval()
    experts = [finetuned(base, seed, only="mlp") for seed in range(2)]
    model, report = upscale(base, experts, rank_of_expert=-1, rank_of_router=4, progress=False)
    names = {f"transformer.h.{i}.mlp.{layer}" for i in (0, 1) for layer in ("c_fc", "c_proj")}
    assert set(smile_layers(model)) == names
    assert {layer.name for layer in report.layers if not layer.skipped} == names
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.randint(50, (2, 7))
    for i, expert in enumerate(experts):
        with routed_to(model, i):
            torch.testing.assert_close(model(ids).logits, expert(ids).logits, atol=1e-10, rtol=0)


def test_layers_and_experts_that_were_not_trained():
    base = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9), nn.Linear(9, 8))
    trained, also = finetuned(base, 0, only="0"), finetuned(base, 1, only="0")
    with torch.no_grad():
        for expert in (trained, also):
            expert[2].bias += torch.randn(8)
    model, report = upscale(base, [trained, copy.deepcopy(base), also], **RANKS)
    assert isinstance(model[0], sk.SmileLinear)
    assert [type(layer) for layer in list(model)[1:]] == [nn.Linear, nn.Linear]
    first, second, third = report.layers
    assert first.skipped is None
    assert list(first.untrained) == [1]
    assert second.skipped == "every expert equals the base"
    assert (second.rank, third.rank) == (0, 0)
    assert "biases only" in third.skipped
    _, ids = sk.functional.route(torch.randn(500, 12), model[0].vh, num_experts_per_tok=1, rank_of_router=2)
    assert set(ids.flatten().tolist()) == {0, 2}
    assert "1 of 3 layers upscaled" in str(report)
    assert "expert 1 untrained" in report.table()


def test_one_expert_that_differs_in_its_bias_only():
    base = nn.Sequential(nn.Linear(5, 4))
    expert = finetuned(base, 0, only="bias")
    model, _ = upscale(base, [expert], **RANKS)
    x = torch.randn(3, 5)
    torch.testing.assert_close(model(x), expert(x))


def test_a_rounded_copy_is_not_trained_and_a_tiny_update_is():
    base = nn.Sequential(nn.Linear(40, 30, bias=False))
    rounded, tiny = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        base[0].weight *= 1e-9
        rounded[0].weight.copy_(base[0].weight * 3 / 3)
        tiny[0].weight.copy_(base[0].weight * (1 + 1e-3 * torch.randn(30, 40)))
    assert not torch.equal(rounded[0].weight, base[0].weight)
    _, report = upscale(base, [rounded, tiny], **RANKS)
    assert list(report.layers[0].untrained) == [0]


@pytest.mark.parametrize("side", ["base", "experts", "one-expert"])
def test_biases_on_one_side_only(side):
    biased = {"base": [1, 0, 0], "experts": [0, 1, 1], "one-expert": [0, 0, 1]}[side]
    base, *experts = (nn.Sequential(nn.Linear(7, 6, bias=bool(b), dtype=torch.float64)) for b in biased)
    model, _ = upscale(base, experts, rank_of_expert=-1, rank_of_router=1, progress=False)
    assert (model[0].bias is not None) == (side == "base")
    x = torch.randn(9, 7, dtype=torch.float64)
    for i, expert in enumerate(experts):
        with routed_to(model, i):
            torch.testing.assert_close(model(x), expert(x), atol=1e-12, rtol=0)


def test_a_bias_that_an_expert_lacks_counts_as_zero_in_the_average(tmp_path):
    base = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    experts = [finetuned(base, seed, only="0") for seed in range(2)]
    experts[0][1].bias = None
    options = {"remaining": "average", "rank_of_expert": 1, "rank_of_router": 1}
    model, _ = upscale(base, experts, **options, progress=False)
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model[1].bias, base[1].bias / 2)

    for i, each in enumerate((base, *experts)):
        (tmp_path / str(i)).mkdir()
        save_file(each.state_dict(), tmp_path / str(i) / "model.safetensors")
    upscale_checkpoints(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "out", **options)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["1.bias"], model[1].bias)


def test_adapters_beside_whole_models():
    base = nn.Sequential(nn.Linear(20, 14), nn.Linear(14, 10, bias=False))
    whole = finetuned(base, 0)
    delta = LowRankDelta(torch.randn(14, 2), torch.randn(2, 20), 0.5)
    bias = torch.randn(10)
    adapter = {"0": ModuleDelta(delta), "1": ModuleDelta(torch.randn(10, 14), bias)}
    model, report = upscale(base, [whole, adapter], rank_of_expert=-1, rank_of_router=2, progress=False)
    merged = copy.deepcopy(base)
    with torch.no_grad():
        merged[0].weight += 0.5 * delta.b @ delta.a
        merged[1].weight += adapter["1"].weight
        merged[1].bias = nn.Parameter(bias)
    x = torch.randn(6, 20)
    for i, expert in enumerate((whole, merged)):
        with routed_to(model, i):
            torch.testing.assert_close(model(x), expert(x), atol=1e-4, rtol=0)
    assert [len(layer.energy) for layer in report.layers] == [2, 2]


def test_computed_weights_are_left_alone():
    base = nn.Sequential(nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    model, report = upscale(base, [finetuned(base, 0, only="0")], **RANKS)
    assert [layer.name for layer in report.layers] == ["0"]
    assert isinstance(model[0], sk.SmileLinear)
    assert isinstance(model[1], nn.Linear)


def test_gradients_train_and_eval_modes_and_other_parameters_survive():
    base = Mlp([6, 7, 5], [True, True], torch.float32)
    base.layers[1].eval()
    model, _ = upscale(base, [finetuned(base, 0)], **RANKS)
    assert [model.layers[0].training, model.layers[1].training] == [True, False]
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in model.layers[0].parameters())
    assert base.scale.grad is None


def test_autocast_does_not_round_what_is_computed_of_weights():
    base = nn.Sequential(nn.Linear(24, 24))
    tuned, factors = finetuned(base, 1), LowRankDelta(torch.randn(24, 4), torch.randn(4, 24), 0.5)

    def made() -> list[Tensor]:
        model, _ = upscale(base, [tuned], **RANKS)
        part = sk.analysis.zone(base[0].weight, tuned[0].weight, "I+mixed")
        return [*model.state_dict().values(), part, factors.dense(torch.zeros(24, 24))]

    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(expected, made(), strict=True))


def test_same_bits_for_any_number_of_threads():
    base = Mlp([300, 280, 40], [True, True], torch.float32)
    experts = [finetuned(base, seed) for seed in range(2)]
    threads = torch.get_num_threads()
    states = []
    for count in (1, 2):
        torch.set_num_threads(count)
        states.append(upscale(base, experts, **RANKS)[0].state_dict())
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_report_is_saved_whole(tmp_path):
    base = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7))
    _, report = upscale(base, [finetuned(base, 0, only="0"), finetuned(base, 1, only="0")], **RANKS)
    report.save(tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    first, second = json.loads((tmp_path / "report.json").read_text())["layers"]
    assert first["name"] == "0"
    assert first["rank"] == 4
    assert first["skipped"] is None
    assert len(first["energy"]) == len(first["error"]) == 2
    assert all(0 < energy < 1 for energy in first["energy"])
    assert first["seconds"] > 0
    assert second["skipped"] == "every expert equals the base"


def test_progress_is_shown_when_asked_for(capsys):
    base = nn.Sequential(nn.Linear(9, 8))
    upscale(base, [finetuned(base, 0)], **{**RANKS, "progress": True})
    assert "upscaling" in capsys.readouterr().err
    upscale(base, [finetuned(base, 0)], **RANKS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_bad_input_names_the_argument_and_changes_nothing(inplace):
    base = Mlp([8, 6, 4], [True, True], torch.float32)
    good = [finetuned(base, seed) for seed in range(2)]

    def broken(change) -> nn.Module:
        model = finetuned(base, 5)
        with torch.no_grad():
            change(model)
        return model

    def nan(name):
        def change(model):
            model.get_parameter(name).view(-1)[1] = math.nan

        return change

    def square_conv1d(model):
        model.layers[1] = transformers.pytorch_utils.Conv1D(4, 6)
        model.layers[1].weight = nn.Parameter(torch.randn(4, 6))

    cases = [
        ({"finetuned": []}, "finetuned: is empty"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok: is 3; expected 1 to 2"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: is 0; expected 1 to 2"),
        ({"remaining": "mean"}, "remaining: is 'mean'; expected 'base' or 'average'"),
        ({"rank_of_expert": 5}, r"layers\.1: rank_of_expert: is 5; expected 1 to 4"),
        ({"rank_of_expert": 0}, r"layers\.0: rank_of_expert: is 0; expected 1 to 6"),
        ({"rank_of_expert": 1.5}, r"rank_of_expert: is 1\.5; expected .* fraction in \(0, 1\)"),
        ({"rank_of_router": 5}, r"layers\.1: rank_of_router: is 5; expected 1 to 4"),
        ({"rank_of_router": 0}, r"layers\.0: rank_of_router: is 0; expected 1 to 6"),
        ({"include": ["*.9"]}, r"include, exclude: \['\*\.9'\] .* leaves none of the 2 linear layers"),
        ({"exclude": ["*"]}, r"include, exclude: .* leaves none"),
        ({"include": []}, r"include, exclude: \[\] without \[\] leaves none of the 2 linear layers"),
        (
            {"finetuned": [good[0], Mlp([8, 6], [True], torch.float32)]},
            r"finetuned\[1\]: has no tensor 'layers\.1\.weight'; expected the base's, \[4, 6\]",
        ),
        (
            {"finetuned": [Mlp([8, 7, 4], [True] * 2, torch.float32), good[0]]},
            r"finetuned\[0\]: tensor 'layers\.0\.weight' has shape \[7, 8\]; expected the base's, \[6, 8\]",
        ),
        (
            {"finetuned": [good[0], copy.deepcopy(good[1]).bfloat16()]},
            r"finetuned\[1\]: tensor 'layers\.0\.weight' is torch\.bfloat16; expected the base's torch\.float32",
        ),
        ({"finetuned": [broken(square_conv1d)]}, r"finetuned\[0\]: layers\.1 is a Conv1D; expected a Linear"),
        (
            {"finetuned": [good[0], broken(nan("layers.1.weight"))]},
            r"finetuned\[1\]: layers\.1\.weight contains NaN or inf",
        ),
        ({"finetuned": [broken(nan("layers.0.bias"))]}, r"finetuned\[0\]: layers\.0\.bias contains NaN or inf"),
        ({"finetuned": [good[0], broken(nan("scale"))]}, r"finetuned\[1\]: scale contains NaN or inf"),
        ({"model": broken(nan("layers.0.weight"))}, r"model: layers\.0\.weight contains NaN or inf"),
        ({"model": nn.Linear(3, 3)}, r"model: is a linear layer; .*SmileLinear\.from_linears"),
        ({"finetuned": [{"other": ModuleDelta()}]}, r"finetuned\[0\]: changes other, which the base lacks"),
        (
            {
                "finetuned": [
                    {"layers.0": ModuleDelta(LowRankDelta(torch.full((6, 1), math.inf), torch.ones(1, 8), 1.0))}
                ]
            },
            r"finetuned\[0\]: layers\.0\.lora_B contains NaN or inf",
        ),
        (
            {"finetuned": [{"layers.0": ModuleDelta(LowRankDelta(torch.ones(5, 1), torch.ones(1, 8), 1.0))}]},
            r"finetuned\[0\]: the change of layers\.0 has shape \[5, 8\]; expected the base's, \[6, 8\]",
        ),
        *(
            ({"finetuned": [{"layers.0": ModuleDelta(LowRankDelta(b, a, 1.0, magnitude))}]}, message)
            for b, a, magnitude, message in (
                (torch.ones(6, 1), torch.ones(2, 8), None, r"layers\.0: lora_B \[6, 1\] does not fit lora_A \[2, 8\]"),
                (torch.ones(6, 1), torch.ones(1, 8), torch.ones(3), r"layers\.0: magnitude has 3 numbers; expected 6"),
                (
                    torch.ones(6, 1).int(),
                    torch.ones(1, 8),
                    None,
                    r"lora_B is torch\.int32 of layout .* dense",
                ),
                (torch.ones(6, 1), torch.ones(1, 8).to_sparse(), None, r"lora_A is \S+ of layout torch\.sparse_coo"),
            )
        ),
    ]
    for options, message in cases:
        options = {"model": base, "finetuned": good, "rank_of_expert": 2, "rank_of_router": 2, **options}
        models = [m for m in (options["model"], *options["finetuned"]) if isinstance(m, nn.Module)]
        before = [state(m) for m in models]
        with pytest.raises(ValueError, match=message):
            upscale(**options, inplace=inplace, progress=False)
        for m, b in zip(models, before):
            assert m.state_dict().keys() == b.keys(), message
            assert all(torch.equal(t.nan_to_num(7), b[name].nan_to_num(7)) for name, t in m.state_dict().items()), (
                message
            )
            assert not smile_layers(m), message


def test_a_model_without_a_plain_linear_layer_is_refused():
    base, expert = (nn.Sequential(weight_norm(nn.Linear(4, 4))) for _ in range(2))
    with pytest.raises(ValueError, match=r"^base: has no linear layer that can have experts; expected an nn\.Linear"):
        upscale(base, [expert], rank_of_expert=2, rank_of_router=2, progress=False)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_refused(whole):
    base, expert = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    base = torch.compile(base, backend="eager") if whole else nn.Sequential(torch.compile(base, backend="eager"))
    with pytest.raises(ValueError, match=rf"^model: {'it' if whole else '0'} is compiled; expected it before"):
        upscale(base, [expert], rank_of_expert=2, rank_of_router=2, progress=False)
