"""Real architectures at toy size, with random weights, and their inputs in the tests."""

import copy

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers.pytorch_utils import Conv1D

from smile_kernels import SmileLinear
from smile_kernels.config import SmileConfig
from smile_kernels.nn import smile_layers

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GROUPED = {**TEXT, "num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CLIP_TEXT = {**TEXT, "max_position_embeddings": 32, **SPECIAL}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 16}

CONFIGS = {
    "MistralForCausalLM": lambda: transformers.MistralConfig(**GROUPED, **SPECIAL),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**GROUPED, **SPECIAL, tie_word_embeddings=True),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(**GROUPED, **SPECIAL),
    "Gemma2ForCausalLM": lambda: transformers.Gemma2Config(**GROUPED, **SPECIAL, head_dim=8),
    "Phi3ForCausalLM": lambda: transformers.Phi3Config(**GROUPED, **SPECIAL),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**GROUPED, **SPECIAL, num_local_experts=4),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, **SPECIAL),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
    ),
    "BertForSequenceClassification": lambda: transformers.BertConfig(**TEXT),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**VISION, **IMAGE),
    "CLIPModel": lambda: transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config={**VISION, **IMAGE}, projection_dim=24
    ),
}


def build(architecture: str, seed: int = 0) -> nn.Module:
    """A model with random weights large enough that its layers matter."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and name.endswith("bias"):
                p.normal_(std=0.1)
            elif p.dim() == 2:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, without the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def fine_tuned(model: nn.Module, seed: int, rank: int = 3) -> nn.Module:
    """The model after a low-rank change to each linear layer, including biases."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in linear_layers(model).values():
            o, d = layer.weight.shape
            layer.weight += torch.randn(o, rank) @ torch.randn(rank, d) * (0.5 / (d * rank) ** 0.5)
            if layer.bias is not None:
                layer.bias += torch.randn_like(layer.bias) * 0.1
    return model


def inputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch the model accepts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (2, 7), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype)
    name = type(model).__name__
    if name.startswith("ViT") or "Vision" in name:
        return {"pixel_values": pixels}
    if name.startswith("CLIP"):
        return {"input_ids": ids, "pixel_values": pixels}
    if name.startswith("T5"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """The first output of the model on its `inputs`, in float32."""
    return model(**inputs(model), return_dict=False)[0].float()


def fuse(base: nn.Module, experts: list[nn.Module], rank_of_expert: int = 4, num_experts_per_tok: int = 1) -> nn.Module:
    """A copy of `base` whose linear layers are SMILE layers, by PyTorch's own SVD, ready for `save_pretrained`."""
    model = copy.deepcopy(base)
    for name, layer in linear_layers(base).items():
        versions = [m.get_submodule(name) for m in (base, *experts)]
        weights = [m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach() for m in versions]
        u, s, vh = torch.linalg.svd(torch.stack(weights[1:]) - weights[0], full_matrices=False)
        factors = {"u": u[..., :rank_of_expert], "s": s[:, :rank_of_expert], "vh": vh[:, :rank_of_expert]}
        if layer.bias is not None:
            factors["expert_bias"] = torch.stack([m.bias.detach() for m in versions[1:]]) - layer.bias.detach()
        smile = SmileLinear.from_factors(
            weights[0], layer.bias, factors, rank_of_router=2, num_experts_per_tok=num_experts_per_tok
        )
        model.set_submodule(name, smile)
    model.config.quantization_config = SmileConfig.from_layers(smile_layers(model)).to_dict()
    return model.eval()


def chat_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    turns = "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    made.chat_template = turns + "<|assistant|>"
    return made


def chat_model(
    tokenizer: transformers.PreTrainedTokenizerFast, hidden_size: int = 32, num_hidden_layers: int = 2
) -> transformers.LlamaForCausalLM:
    """A model for `tokenizer`, with random weights large enough that its layers matter."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 48, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=num_hidden_layers, **sizes, **ids)
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(std=p.shape[-1] ** -0.5)
    return model
