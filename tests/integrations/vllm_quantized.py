"""Experts on quantised bases in vLLM compared with transformers: `make test-vllm`."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from vllm import SamplingParams

from smile_kernels import routing_override
from smile_kernels.integrations.quantization import split_base
from smile_kernels.upscaling import upscale_checkpoints
from tests.integrations.tiny_models import build
from tests.upscaling.test_quantized import INT8, adapter, quantised

from .vllm_served import ENVIRONMENT, PER_REQUEST, PROMPTS, TOKENS, avoid_int8_tiles, greedy, in_a_process, in_vllm


class Int8Linear(nn.Linear):
    """A linear layer whose weight and input are rounded to 8 bits, with a scale per row."""

    def forward(self, x):
        scale, size = (t.abs().amax(-1, keepdim=True) / 127 for t in (self.weight, x))
        return ((x / size).round() @ (self.weight / scale).round().T) * size * scale.T


def asking(folder: Path, asked: list, prompts: list, options: dict) -> list[list[list[int]]]:
    """Greedy tokens if every request selects the same expert, for each of `asked`."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    options = {"dtype": "float32", "max_model_len": 64, **options}
    avoid_int8_tiles(options)
    engine = LLM(str(folder), skip_tokenizer_init=True, **options)
    answers = []
    for expert in asked:
        extra = None if expert is None else {"expert": expert}
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    return answers


@pytest.mark.engine
def test_adapters_on_an_int8_base(tmp_path):
    """Each expert by request and the router's choice, compared with an emulation in transformers."""
    plain = tmp_path / "plain"
    build("LlamaForCausalLM").save_pretrained(plain)
    base = quantised(plain, tmp_path / "base", INT8)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    adapters = [adapter(tmp_path / name, plain, rank, targets) for name, rank in (("a", 4), ("b", 3))]
    options = {"rank_of_expert": 4, "rank_of_router": 2, "exclude": ["lm_head"]}
    upscale_checkpoints(base, adapters, tmp_path / "fused", **options)
    upscale_checkpoints(plain, adapters, tmp_path / "same", **options)
    emulated = split_base(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "same"))
    for name, module in emulated.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.__class__ = Int8Linear
    asked, want = [{}, "a", "b", None], []
    for expert in asked:
        with routing_override(emulated, expert):
            want.append([greedy(emulated, prompt) for prompt in PROMPTS])
    assert len({str(tokens) for tokens in want}) == 4
    assert in_vllm(base) == want[:1]
    options = {"enforce_eager": True, **PER_REQUEST}
    assert in_a_process(asking, tmp_path / "fused", asked, PROMPTS, options) == want

    # When compiled, a number may round to the adjacent 8-bit value, so near-ties may differ.
    (compiled,) = in_vllm(tmp_path / "fused", enforce_eager=False)
    assert apart(emulated, compiled) < 0.05 < 0.5 < min(apart(emulated, tokens) for tokens in want[:3])


@torch.no_grad()
def apart(model: nn.Module, tokens: list[list[int]]) -> float:
    """How much smaller the model's logit of a token is than its largest one, at most, in standard deviations."""
    gaps = []
    for prompt, answer in zip(PROMPTS, tokens):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gaps.append(float(((logits.amax(-1) - chosen) / logits.std(-1)).max()))
    return max(gaps)


@torch.no_grad()
def off(half: nn.Module, model: nn.Module, tokens: list[list[int]]) -> float:
    """The largest error of a logit by `half`, the model in bfloat16, in standard deviations."""
    errors = []
    for prompt, answer in zip(PROMPTS, tokens):
        got, want = (
            each(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float() for each in (half, model)
        )
        errors.append(float(((got - want).abs().amax(-1) / want.std(-1)).max()))
    return max(errors)


class Fp8Linear(nn.Linear):
    """A linear layer whose input is rounded to float8, with a scale per row."""

    def forward(self, x):
        size = x.abs().amax(-1, keepdim=True) / 448
        return super().forward((x / size).to(torch.float8_e4m3fn).to(x.dtype) * size)


def rounded(plain: Path, to: Path, method: str) -> Path:
    """The checkpoint with its blocks' linear layers in float8, or in 4 bits in groups of 32.

    The folder `to`-plain has the same weights as float32.
    """

    def packed(values: torch.Tensor, order=range(8)) -> torch.Tensor:
        groups = values.long().unflatten(-1, (-1, 8))[..., list(order)]
        return (groups << 4 * torch.arange(8)).sum(-1).to(torch.int32)

    equal = to.with_name(f"{to.name}-plain")
    for folder in (to, equal):
        shutil.copytree(plain, folder)
    stored, same = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = same[name] = tensor
            continue
        layer, (o, d) = name.removesuffix(".weight"), tensor.shape
        if method == "fp8":
            scale = tensor.abs().amax(1, keepdim=True) / 448
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
            same[name] = stored[name].float() * scale
            continue
        groups = tensor.unflatten(1, (-1, 32))
        scale = (groups.abs().amax(-1) / 7).bfloat16().float()
        q = ((groups / scale[..., None]).round() + 8).clamp(0, 15).long()
        same[name], q = ((q - 8) * scale[..., None]).flatten(1), q.flatten(1)
        if method == "compressed-tensors":
            parts = {"weight_packed": packed(q), "weight_scale": scale, "weight_shape": torch.tensor([o, d])}
        else:
            parts = {"scales": scale.T.contiguous(), "qzeros": packed(torch.full((d // 32, o), 8 - (method == "gptq")))}
            columns = packed(q.T, (0, 2, 4, 6, 1, 3, 5, 7))
            parts["qweight"] = columns if method == "awq" else packed(q).T.contiguous()
            if method == "gptq":
                parts["g_idx"] = torch.arange(d, dtype=torch.int32) // 32
        stored |= {f"{layer}.{part}": values for part, values in parts.items()}
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    both = {"weights": fp8, "input_activations": fp8 | {"strategy": "token", "dynamic": True}}
    settings: dict[str, dict] = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        "compressed-tensors": INT8 | {"format": "pack-quantized", "config_groups": {"group_0": {"weights": int4}}},
        "fp8": INT8 | {"format": "float-quantized", "config_groups": {"group_0": both}},
    }
    for group in settings[method].get("config_groups", {}).values():
        group["targets"] = ["Linear"]
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings[method]}
    (to / "config.json").write_text(json.dumps(config))
    for folder, tensors in ((to, stored), (equal, same)):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.engine
@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq", "fp8"])
def test_adapters_on_a_base_of_few_bits(method, tmp_path):
    """In bfloat16, as vLLM's kernels: tokens are those of transformers with the same weights, except near-ties."""
    plain = tmp_path / "plain"
    build("LlamaForCausalLM").save_pretrained(plain)
    base = rounded(plain, tmp_path / "base", method)
    adapters = [adapter(tmp_path / name, plain, 3, ["q_proj", "v_proj", "o_proj", "up_proj"]) for name in "ab"]
    options = {"rank_of_expert": 4, "rank_of_router": 2, "exclude": ["lm_head"]}
    upscale_checkpoints(base, adapters, tmp_path / "fused", **options)
    upscale_checkpoints(tmp_path / "base-plain", adapters, tmp_path / "same", **options)
    model = split_base(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "same"))
    for name, module in model.named_modules():
        if method == "fp8" and type(module) is nn.Linear and name != "lm_head":
            module.__class__ = Fp8Linear
    asked = [{}, "a", "b"]  # not the router's choice, which rounding changes between experts of nearly equal energy
    options = {"dtype": "bfloat16", "enforce_eager": True, **PER_REQUEST}
    answers = in_a_process(asking, tmp_path / "fused", asked, PROMPTS, options)
    half = copy.deepcopy(model).bfloat16()
    for i, expert in enumerate(asked):
        with routing_override(model, expert), routing_override(half, expert):
            gaps = [apart(model, tokens) for tokens in answers]
            assert gaps[i] < 4 * off(half, model, answers[i])  # two logits, by two implementations
        assert gaps.pop(i) < min(gaps) / 4
