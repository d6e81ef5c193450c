"""Tiny models of a dozen architectures, fine-tuned in full and by LoRA, fused in memory and from disk.

With one expert at full rank the fused model is the fine-tuned one to rounding, or its report names what is not held.
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
from smile_kernels.upscaling.verify import example_inputs

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
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and p.shape[1] > 1:
                p.normal_(std=p.shape[1] ** -0.5)
    return model


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # some forwards draw which patches they see
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
    torch.manual_seed(1)
    targets = TARGETS.get(type(base).__name__, "all-linear")
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(folder)
    return model.merge_and_unload()


def check(base: nn.Module, tune, tmp_path) -> None:
    """In memory and from disk the same layers are upscaled and the same changes listed; without any, all is equal."""
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


SMALL = {
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
SMALL |= {"hidden_dim": 48, "head_dim": 8, "ffn_dim": 48, "embedding_size": 16, "max_position_embeddings": 64}
SMALL |= {
    f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("ffn_dim", 48))
}
SMALL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "state_size": 4, "moe_intermediate_size": 24}
SMALL |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("model_type", CONFIG_MAPPING.keys())
def test_every_architecture_that_can_be_made_tiny(model_type, tmp_path):
    """Equal, listed, or refused by the name of a layer: one with a single output, or no linear layer at all."""
    try:
        config_class = CONFIG_MAPPING[model_type]
        plain = config_class()
        config = config_class(**{name: value for name, value in SMALL.items() if hasattr(plain, name)})
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
        if size > 3_000_000:
            pytest.skip(f"has {size:,} parameters at the smallest")
        torch.manual_seed(0)
        base = transformers.AutoModel.from_config(config).eval()
        output(base)
    except Exception as error:
        pytest.skip(f"cannot be made tiny and run on random inputs: {type(error).__name__}")
    try:
        check(base, tune_whole, tmp_path)
    except ValueError as error:
        assert "expected 1 to 1, for a weight of shape" in str(error) or "of the 0 linear layers" in str(error)  # noqa: PT017
