"""LoRA adapters written by PEFT, compared with the models that PEFT merges."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels import cli
from smile_kernels.integrations.peft import LowRankDelta, adapter_deltas, is_adapter
from smile_kernels.nn import smile_layers
from smile_kernels.svd import lora_svd
from smile_kernels.upscaling import upscale_checkpoints
from tests.integrations.tiny_models import build, fine_tuned, inputs, output

Q_PROJ = "model.layers.0.self_attn.q_proj"


def adapter(architecture: str, directory, seed: int = 0, **options):
    """Saves a LoRA adapter with random weights; returns the base and PEFT's own merged model."""
    base = build(architecture)
    torch.manual_seed(seed + 1)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options})
    model = peft.get_peft_model(build(architecture), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                p.add_(torch.rand_like(p) * 0.3)
    model.save_pretrained(directory)
    return base, model.merge_and_unload()


def change(base, merged, module: str, name: str) -> torch.Tensor:
    layer, after = base.get_submodule(module), merged.get_submodule(module)
    before = getattr(layer, name)
    delta = getattr(after, name).detach() - (0 if before is None else before.detach())
    return delta.T if name == "weight" and isinstance(layer, Conv1D) else delta


OPTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "use_rslora": True},
    {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"down_proj": 11, "q_proj": 2},
    },
    {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *(("MistralForCausalLM", options) for options in OPTIONS),
        *(("Qwen2ForCausalLM", options) for options in OPTIONS),
        ("Qwen2ForCausalLM", {"target_modules": ["q_proj"], "lora_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_changes_are_those_peft_merges(architecture, options, tmp_path):
    base, merged = adapter(architecture, tmp_path, **options)
    deltas = adapter_deltas(tmp_path, base.state_dict())
    changed = 0
    for module, layer in base.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        delta = deltas.pop(module, None)
        for name in ("weight", "bias"):
            if getattr(merged.get_submodule(module), name) is None:
                continue
            want = change(base, merged, module, name)
            got = None if delta is None else getattr(delta, name)
            if isinstance(got, LowRankDelta):
                r = got.a.shape[0]
                svd = lora_svd(got.b, got.a, got.scale, r)
                product = (svd.u * svd.s) @ svd.vh
                torch.testing.assert_close(product, got.scale * got.b @ got.a, rtol=1e-5, atol=1e-6)
                got = product
            changed += got is not None
            torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want, rtol=1e-4, atol=1e-5)
    assert changed > 1
    assert not deltas


def test_conv1d(tmp_path):
    base, merged = adapter("GPT2LMHeadModel", tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    for module, delta in adapter_deltas(tmp_path, base.state_dict()).items():
        got = delta.weight.scale * delta.weight.b @ delta.weight.a
        torch.testing.assert_close(got, change(base, merged, module, "weight"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "GPT2LMHeadModel"])
def test_dora_is_dense_and_says_so(architecture, tmp_path):
    conv1d = architecture.startswith("GPT2")
    target = ["c_fc"] if conv1d else ["q_proj", "down_proj"]
    base, merged = adapter(architecture, tmp_path, target_modules=target, fan_in_fan_out=conv1d, use_dora=True)
    with pytest.warns(UserWarning, match=r"DoRA rescales rows, so the changes of \d layers"):
        deltas = adapter_deltas(tmp_path, base.state_dict())
    for module, delta in deltas.items():
        weight = base.get_submodule(module).weight.detach()
        got = delta.weight.dense(weight.T if conv1d else weight)
        torch.testing.assert_close(got, change(base, merged, module, "weight"), rtol=1e-4, atol=1e-5)


def test_trained_biases_that_were_not_saved_are_named(tmp_path):
    """An adapter with `bias="lora_only"` as written by PEFT before 0.21."""
    base, _ = adapter("Qwen2ForCausalLM", tmp_path, target_modules=["q_proj", "up_proj"], bias="lora_only")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}, file)
    assert len(load_file(file)) == len(tensors) - 2
    with pytest.warns(UserWarning, match=rf"not saved for 2 layers such as {Q_PROJ}, .*PEFT before 0\.21"):
        deltas = adapter_deltas(tmp_path, base.state_dict())
    assert all(delta.bias is None for delta in deltas.values())


def test_what_cannot_be_an_expert_is_listed(tmp_path):
    base, _ = adapter(
        "MistralForCausalLM", tmp_path, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"]
    )
    deltas = adapter_deltas(tmp_path, base.state_dict())
    assert set(deltas) > {Q_PROJ, Q_PROJ.replace("0", "1"), "model.norm", "model.embed_tokens"}
    with pytest.warns(UserWarning, match=r"left out of the result: .*model\.(norm|embed_tokens)\.weight"):
        _, report = sk.upscale(base, [deltas], rank_of_expert=3, rank_of_router=2, progress=False)
    assert {lost.name for lost in report.lost} > {"model.norm.weight", "model.embed_tokens.weight"}
    assert all("norm" in lost.name or "embed" in lost.name for lost in report.lost)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: .* is LOHA; expected LORA"),
        ({"peft_type": "ADALORA"}, "peft_type: .* is ADALORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .*'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: .*'olora'"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: is set"),
        ({"use_new_variant": True}, "use_new_variant: is set"),
        ({"new_variant_config": {"k": 1}}, "new_variant_config: is set"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_other_kinds_are_refused_by_name(config, message, tmp_path):
    base, _ = adapter("MistralForCausalLM", tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        adapter_deltas(tmp_path, base.state_dict())


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapter("MistralForCausalLM", tmp_path, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"changes '{Q_PROJ}', which the base lacks"):
        adapter_deltas(tmp_path, build("GPT2LMHeadModel").state_dict())


def test_no_adapter(tmp_path):
    assert not is_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        adapter_deltas(tmp_path, {})


def test_quiet_without_reason(tmp_path):
    base, _ = adapter("MistralForCausalLM", tmp_path, target_modules=["q_proj"])
    assert is_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(adapter_deltas(tmp_path, base.state_dict())) == 2


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("MistralForCausalLM", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}}),
        ("Qwen2ForCausalLM", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only", "use_rslora": True}),
        ("GPT2LMHeadModel", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=["Mistral", "Qwen2", "GPT2"],
)
def test_one_adapter_is_exactly_the_merged_model(architecture, options, tmp_path):
    """In memory and from disk: with one expert the weight is 1, so only rounding may differ."""
    base, merged = adapter(architecture, tmp_path / "adapter", **options)
    base.save_pretrained(tmp_path / "base")
    ranks = {"rank_of_expert": 6, "rank_of_router": 2}
    in_memory, _ = sk.upscale(base, [adapter_deltas(tmp_path / "adapter", base.state_dict())], **ranks, progress=False)
    upscale_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "fused", **ranks)
    from_disk = type(base).from_pretrained(tmp_path / "fused")
    for model in (in_memory, from_disk):
        assert smile_layers(model)
        torch.testing.assert_close(output(model), output(merged), rtol=1e-3, atol=1e-4)
        assert [verdict.verdict for verdict in sk.verify(model, base, [merged])] == ["exact"]
    assert (output(base) - output(merged)).abs().max() > 0.05


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM"])  # without biases, and with some
@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}, {"bias": "all", "use_dora": True}], ids=str
)
@pytest.mark.filterwarnings("ignore:.*DoRA rescales rows")
def test_trained_biases_in_double_precision(architecture, options, tmp_path):
    base = build(architecture).double()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    tuned = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    tuned.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    ranks = {"rank_of_expert": -1, "rank_of_router": 2}
    deltas = adapter_deltas(tmp_path / "adapter", base.state_dict())
    in_memory, report = sk.upscale(base, [deltas], **ranks, progress=False)
    on_disk = upscale_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "fused", **ranks)
    assert not report.lost + on_disk.lost
    for model in (in_memory, type(base).from_pretrained(tmp_path / "fused")):
        want = tuned(**inputs(base)).logits
        torch.testing.assert_close(model(**inputs(base)).logits, want, rtol=1e-12, atol=1e-12)


def test_a_mixed_pool(tmp_path):
    """A full fine-tune and two adapters of other ranks and targets: the command writes the same model as in memory."""
    base, _ = adapter("MistralForCausalLM", tmp_path / "a", target_modules=["q_proj", "v_proj"])
    adapter("MistralForCausalLM", tmp_path / "b", seed=5, target_modules=["q_proj", "up_proj"], r=2, lora_alpha=9)
    full = fine_tuned(base, 7)
    base.save_pretrained(tmp_path / "base")
    full.save_pretrained(tmp_path / "full")
    command = ["upscale", "--base", tmp_path / "base", "--out", tmp_path / "fused", "--exclude", "lm_head"]
    command += [word for name in ("full", "a", "b") for word in ("--expert", tmp_path / name)]
    command += ["--rank-of-expert", "4", "--rank-of-router", "2", "--num-experts-per-tok", "2"]
    result = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    deltas = [adapter_deltas(tmp_path / name, base.state_dict()) for name in ("a", "b")]
    in_memory, _ = sk.upscale(
        base,
        [full, *deltas],
        rank_of_expert=4,
        rank_of_router=2,
        num_experts_per_tok=2,
        exclude=["lm_head"],
        progress=False,
    )
    from_disk = type(base).from_pretrained(tmp_path / "fused")
    assert set(smile_layers(from_disk)) == set(smile_layers(in_memory))
    torch.testing.assert_close(output(from_disk), output(in_memory), rtol=1e-4, atol=1e-4)
    assert {verdict.verdict for verdict in sk.verify(tmp_path / "fused")} <= {"exact", "truncated"}


A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
FACTORS = {A: torch.ones(2, 6), B: torch.ones(5, 2)}
E = {"base_model.model.0.lora_embedding_A": torch.ones(2, 5), "base_model.model.0.lora_embedding_B": torch.ones(6, 2)}
ROWS = {"base_model.model.0.trainable_tokens_delta": torch.ones(1, 6)}
MAGNITUDE = {"base_model.model.0.lora_magnitude_vector": torch.ones(5)}
FOLDED = {A: torch.ones(2, 6, 1), B: torch.ones(5, 2, 1)}  # as of a convolution


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {}, "contains no tensors; expected the factors"),
        ({A: torch.ones(0, 6), B: torch.ones(5, 0)}, {}, r"torch.float32 \[0, 6\]; expected floating-point numbers"),
        ({name: t.int() for name, t in FACTORS.items()}, {}, "torch.int32"),
        ({name: t.to(torch.complex64) for name, t in FACTORS.items()}, {}, "torch.complex64"),
        (FACTORS | {B: torch.ones(5)}, {}, r"lora_B \[5\] does not fit lora_A"),
        (FACTORS | {"base_model.model.0.alpha": torch.ones(2)}, {}, r"alpha has shape \[2\]; expected 1 numbers"),
        (
            FACTORS | {"base_model.model.0.lora_magnitude_vector": torch.ones(3)},
            {},
            "magnitude has 3 numbers; expected 5",
        ),
        (
            E | {"base_model.model.0.lora_embedding_B": torch.ones(6, 3)},
            {},
            r"lora_B \[5, 2\] does not fit lora_A \[3, 6\]",
        ),
        (FACTORS | {"base_model.model.0.lora_B.bias": torch.ones(3)}, {}, "lora_B.bias has shape"),
        (
            FACTORS | {"base_model.model.0.base_layer.weight": torch.ones(5, 6)},
            {},
            "has factors and another weight of 0",
        ),
        (FACTORS, {"lora_alpha": "8"}, "lora_alpha: is '8'; expected a number"),
        (FACTORS, {"lora_alpha": True}, "lora_alpha: is True; expected a number"),
        (FACTORS, {"lora_alpha": 1e300}, "lora_alpha: is 1e"),
        (FACTORS, {"alpha_pattern": {"(": 1}}, "is not a regular expression"),
        (
            FACTORS,
            {"alpha_pattern": {"(?:1){s<=1}": 1}},
            r"not a regular expression \({s<=1} is not syntax of",
        ),
        (
            FACTORS,
            {"rank_pattern": {"[[:digit:]]": 1}},
            r"not a regular expression \(\[\[: is not syntax of",
        ),
        (FACTORS, {"target_modules": r"\p{Nd}"}, r"not a regular expression \(bad escape"),
        (FACTORS, {"alpha_pattern": {"0": -1}}, "alpha_pattern.0: is -1"),
        (FACTORS, {"use_rslora": "yes"}, "use_rslora: is 'yes'; expected a boolean"),
        (FACTORS, {"init_lora_weights": [1]}, "init_lora_weights: is"),
        (FACTORS, {"trainable_token_indices": [-1]}, r"trainable_token_indices.0: is -1"),
        (
            {"base_model.model.0.trainable_tokens_delta": torch.ones(2, 6)},
            {"trainable_token_indices": [1, 1]},
            "trainable_token_indices: does not fit 0",
        ),
        (FACTORS | E, {}, "0 has lora_A and lora_embedding_A; expected one kind of change"),
        (FACTORS | ROWS, {"trainable_token_indices": [1]}, "0 has lora_A and trainable_tokens_delta"),
        (E | ROWS, {"trainable_token_indices": [1]}, "0 has lora_embedding_A and trainable_tokens_delta"),
        (E | MAGNITUDE, {"use_dora": True}, "0 has lora_magnitude_vector; expected it on a linear layer"),
        (MAGNITUDE, {"use_dora": True}, "0 has lora_magnitude_vector; expected it on a linear layer"),
        (FOLDED | MAGNITUDE, {"use_dora": True}, "0 has lora_magnitude_vector; expected it on a linear layer"),
        (FOLDED | {"base_model.model.0.alpha": torch.ones(1)}, {}, "0 has alpha; expected it on a linear layer"),
    ],
)
def test_malformed_adapters_are_named(tmp_path, tensors, config, message):
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(sk.SmileError, match=message) as raised:
        adapter_deltas(tmp_path, torch.nn.Sequential(torch.nn.Linear(6, 5)))
    assert str(tmp_path) in str(raised.value)


def test_rows_of_two_embeddings_with_the_same_last_name(tmp_path):
    """As PEFT reads the keys: the one with which the module's name ends, the longest."""
    base = torch.nn.ModuleDict({name: torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 3)}) for name in ("a", "b")})
    keys = {"a": [1, 2], "b": [4, 0]}
    rows = {name: torch.randn(2, 3) for name in keys}
    tensors = {f"base_model.model.{name}.embed.trainable_tokens_delta": value for name, value in rows.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    indices = {"embed": [5], **{f"{name}.embed": value for name, value in keys.items()}}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "trainable_token_indices": indices}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    deltas = adapter_deltas(tmp_path, base)
    for name, index in keys.items():
        new = base[name].embed.weight.detach() + deltas[f"{name}.embed"].weight
        torch.testing.assert_close(new[index].float(), rows[name])


def test_an_adapter_of_a_part_of_the_base_is_refused_where_several_parts_have_its_names(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 16, "max_position_embeddings": 8}, vision_config=vision)
    name = "encoder.layers.0.self_attn.q_proj"
    save_file(
        {
            f"base_model.model.{name}.lora_A.weight": torch.ones(2, 8),
            f"base_model.model.{name}.lora_B.weight": torch.ones(8, 2),
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    with pytest.raises(sk.SmileError, match=f"the base has as text_model.{name} and as vision_model.{name}"):
        adapter_deltas(tmp_path, CLIPModel(config))
    assert list(adapter_deltas(tmp_path, CLIPVisionModel(config.vision_config))) == [name]


def test_a_peft_model_is_refused_with_the_remedy():
    base = build("LlamaForCausalLM")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"finetuned\[0\]: is a PeftModel; expected its merge_and_unload\(\)"):
        sk.upscale(base, [model], rank_of_expert=2, rank_of_router=2, progress=False)


SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("spelling", ["lm_head", "lm_head.modules_to_save.default"])
@pytest.mark.parametrize("named", [False, True])
def test_a_head_saved_whole_that_the_config_does_not_name(tmp_path, is_tied, spelling, named):
    """PEFT loads it into the base's own head, with which a tied embedding changes, or ignores it."""
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=is_tied))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{key}A.weight": torch.ones(2, 16), f"{key}B.weight": torch.ones(16, 2)}
    head = torch.ones_like(base.lm_head.weight)
    save_file(factors | {f"base_model.model.{spelling}.weight": head}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | ({"modules_to_save": ["lm_head"]} if named else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "lm_head" in adapter_deltas(tmp_path, base)
    said = [str(one.message) for one in caught if "saves lm_head whole" in str(one.message)]
    does = "ignores it" if spelling != "lm_head" else "also changes model.embed_tokens" if is_tied else None
    assert len(said) == (does is not None and not named)
    assert all(does in one for one in said)


def test_an_alpha_that_is_stored_with_the_factors(tmp_path):
    save_file(FACTORS | {"base_model.model.0.alpha": torch.tensor(4.0)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    delta = adapter_deltas(tmp_path, torch.nn.Sequential(torch.nn.Linear(6, 5)))["0"].weight
    assert delta.scale == 2
