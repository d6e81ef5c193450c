"""Tiny models of a dozen architectures, fine-tuned in full and by LoRA, fused in memory and from disk.

With one expert at full rank the fused model equals the fine-tuned one up to rounding, or the report lists the rest.
"""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import smile_kernels as sk
from smile_kernels.integrations.peft import adapter_deltas
from smile_kernels.upscaling.inputs import example_inputs
from smile_kernels.upscaling.layers import layers_of_model

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GROUPED = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"image_size": 32, "patch_size": 16}
WAVE = {**TEXT, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
WAVE |= {"num_conv_pos_embedding_groups": 2}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
ARCHITECTURES = {
    "LlamaForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "eos_token_id": 2},
    "T5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},
    "BertForMaskedLM": TEXT,
    "NomicBertModel": {**TEXT, "pad_token_id": 0},
    "ViTForImageClassification": IMAGE,
    "Dinov2Model": {**IMAGE, "use_swiglu_ffn": True},
    "WavLMForCTC": WAVE,
    "MambaForCausalLM": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 96},
}
# PEFT adapts a mixture's fused experts as `target_parameters`, which are refused, and refuses some layers itself.
TARGETS = {
    "MixtralForCausalLM": ["q_proj", "v_proj"],
    "WavLMForCTC": ["q_proj", "intermediate_dense"],
    "MambaForCausalLM": ["in_proj", "x_proj"],
}
RANKS = {"rank_of_expert": -1, "rank_of_router": 2}


def build(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**ARCHITECTURES[architecture])).eval()
    enliven(model)
    return model


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Weights large enough that each affects the output."""
    for p in model.parameters():
        if p.dim() == 2 and p.shape[1] > 1:
            p.normal_(std=p.shape[1] ** -0.5)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # some forwards select patches at random
    values = model(**example_inputs(model)).to_tuple()
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


def tune_whole(base: nn.Module, folder) -> nn.Module:
    """Every parameter changed, the linear layers most."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in linear:
                p += 0.3 * p.std() * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def tune_lora(base: nn.Module, folder) -> nn.Module:
    """LoRA on every linear layer except for the head: "all-linear" without the experts of a mixture that PEFT adds."""
    torch.manual_seed(1)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linear = [name for name, layer in layers_of_model(base).items() if base.get_submodule(name) is not head]
    targets = TARGETS.get(type(base).__name__, linear)
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(folder)
    return model.merge_and_unload()


def check(base: nn.Module, tune, tmp_path) -> None:
    """In memory and from disk the same layers are upscaled and changes listed; without changes, outputs are equal."""
    expert = tune(base, tmp_path / "expert")
    base.save_pretrained(tmp_path / "base")
    given = adapter_deltas(tmp_path / "expert", base) if tune is tune_lora else expert
    in_memory, first = sk.upscale(base, [given], progress=False, **RANKS)
    second = sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
    on_disk = type(base).from_pretrained(tmp_path / "out")
    assert {lost.name for lost in first.lost} == {lost.name for lost in second.lost}
    assert {layer.name for layer in first.layers if not layer.skipped} == {
        layer.name for layer in second.layers if not layer.skipped
    }
    want = output(expert)
    for model in (in_memory, on_disk):
        if first.lost:  # such as the embedding that a changed head is tied to
            assert all(lost.reason == "an embedding" for lost in first.lost)
        else:
            torch.testing.assert_close(output(model), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("tune", [tune_whole, tune_lora], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_or_listed(architecture, tune, tmp_path):
    base = build(architecture)
    check(base, tune, tmp_path)
    assert (output(base) - output(tune(base, tmp_path / "again"))).norm() > 0.01 * output(base).norm()


SIZES = {
    **GROUPED,
    **IMAGE,
    **WAVE,
    **T5,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
}
SIZES |= {"hidden_dim": 48, "head_dim": 8, "ffn_dim": 48, "embedding_size": 16, "max_position_embeddings": 64}
for side in ("encoder_", "decoder_"):
    SIZES |= {f"{side}layers": 2, f"{side}ffn_dim": 48, f"{side}attention_heads": 4}
SIZES |= {
    "state_size": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "embed_dim": 32,
    "depth": 2,
}
SIZES |= {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "projection_dim": 16,
}
HEADS = ("MaskedLM", "CausalLM", "Seq2SeqLM", "CTC", "ImageClassification", "SequenceClassification")


def fits(size: object, default: object) -> bool:
    """Whether a config takes such a size: a number, or as many numbers as it has by default."""
    return default is not None and isinstance(size, tuple) == isinstance(default, (tuple, list))


def small(config: transformers.PreTrainedConfig) -> dict[str, object]:
    """The arguments for a small config, and for the models in it."""
    sizes: dict[str, object] = {name: size for name, size in SIZES.items() if fits(size, getattr(config, name, None))}
    for name in getattr(type(config), "sub_configs", ()):
        part = getattr(config, name, None)
        if part is not None:
            sizes[name] = {**small(part), **({"model_type": part.model_type} if part.model_type else {})}
    return sizes


def build_tiny(model_type: str) -> nn.Module:
    """A tiny model that runs on random inputs, with a head if one is known."""
    kind = CONFIG_MAPPING[model_type]
    autos = [auto for head in HEADS if kind in (auto := getattr(transformers, f"AutoModelFor{head}"))._model_mapping]
    error: Exception | None = None
    for auto in [*autos[:1], transformers.AutoModel]:
        for sizes in (small(kind()), {name: size for name, size in small(kind()).items() if name in SIZES}):
            try:
                config = kind(**sizes)
                with torch.device("meta"):
                    count = sum(p.numel() for p in auto.from_config(config).parameters())
                if count > 3_000_000:
                    raise OverflowError(f"has {count:,} parameters at the smallest")
                torch.manual_seed(0)
                model = auto.from_config(config).eval()
                enliven(model)
                if not 0 < output(model).norm() < torch.inf:
                    raise ArithmeticError("gives NaN, inf or only zeros")
                return model
            except Exception as first:  # whatever an architecture raises for sizes that do not match
                error = error or first
    assert error is not None
    raise error


@torch.no_grad()
def tune_all(base: nn.Module, folder) -> nn.Module:
    """Every parameter changed."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    for p in model.parameters():
        if p.is_floating_point():
            p += (0.3 if p.dim() > 1 else 0.05) * p.std(correction=0).clamp_min(0.01) * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def put_in(model: nn.Module, expert: nn.Module, lost: list[sk.upscaling.LostChange]) -> None:
    """Copy the tensors that the report lists to the fused model, except for those in SMILE layers."""
    state, theirs = model.state_dict(keep_vars=True), expert.state_dict(keep_vars=True)
    listed = {id(state[one.name]): theirs[one.name].detach() for one in lost}
    for module in model.modules():
        for name, p in module._parameters.items():
            if id(p) in listed and not isinstance(module, sk.SmileLinear):
                module._parameters[name] = nn.Parameter(listed[id(p)].clone())


def outcome(base: nn.Module, tune, folder) -> str:
    """The result of comparing a fused model with the fine-tuned one, in memory and from disk."""
    try:
        expert = tune(base, folder / "expert")
    except Exception as error:  # PEFT does not adapt such a layer
        if tune is tune_all:
            raise
        return f"PEFT: {type(error).__name__}"
    base.save_pretrained(folder / "base")
    ranks = {"rank_of_expert": -1, "rank_of_router": 1}
    folders = folder / "base", [folder / "expert"], folder / "out"
    try:
        given = adapter_deltas(folder / "expert", base) if tune is tune_lora else expert
        in_memory, first = sk.upscale(base, [given], progress=False, **ranks)
    except ValueError as error:
        refusal = str(error).partition(":")[0]
        with pytest.raises(ValueError, match=rf"^({refusal}|base|experts)"):
            sk.upscale_checkpoints(*folders, **ranks)
        return f"refused: {str(error).replace(str(folder), '...')}"
    second = sk.upscale_checkpoints(*folders, **ranks)
    on_disk = type(base).from_pretrained(folder / "out")
    assert sorted(lost.name for lost in first.lost) == sorted(lost.name for lost in second.lost)
    assert {one.name: one.skipped for one in first.layers} == {one.name: one.skipped for one in second.layers}
    want = output(expert)
    for model in (in_memory, on_disk):
        put_in(model, expert, first.lost)
        torch.testing.assert_close(output(model), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    change = ((output(base) - want).norm() / want.norm()).item()
    assert change > 1e-3, f"the fine-tuned model differs from its base only by {change:.1g}, which tests nothing"
    listed = [lost.name for lost in first.lost] if tune is tune_lora else []
    return "equal" + (f"; listed: {', '.join(listed)}" if listed else "")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", CONFIG_MAPPING.keys())
def test_every_architecture_that_can_be_made_tiny(model_type, tmp_path, record_property):
    """Equal after copying the tensors in the report, in memory and from disk; or refused by name on both paths.

    `tests/compatibility.py architectures` writes the records of this test to docs/architectures.md.
    """
    try:
        base = build_tiny(model_type)
    except Exception as error:
        record_property("architecture", {"model_type": model_type, "skipped": f"{type(error).__name__}: {error}"[:200]})
        pytest.skip(f"cannot be made tiny and run on random inputs: {type(error).__name__}: {error}")
    row = {"model_type": model_type, "class": type(base).__name__}
    row["layers"] = len(layers := layers_of_model(base))
    row["unfit"] = sorted({layer.unfit for layer in layers.values() if layer.unfit})
    record_property("architecture", row)
    row["full"] = outcome(base, tune_all, tmp_path / "full")
    row["lora"] = outcome(base, tune_lora, tmp_path / "lora")
