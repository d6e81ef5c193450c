"""SMILE checkpoints in vLLM compared with transformers: `make test-vllm`, in a separate environment.

Not collected by default: vLLM pins other versions of its dependencies, and each engine takes about 20 s to start. So
there is one engine for each architecture and number of ranks, and each of them tests several properties.
"""

import asyncio
import copy
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm import SamplingParams
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from smile_kernels import (
    RoutingPolicy,
    SmileLinear,
    get_routing,
    remove_expert,
    replace_expert,
    routing_override,
    watch_routing,
)
from smile_kernels.checkpoint import add_calibration
from smile_kernels.config import SmileConfig, SmileModuleConfig
from smile_kernels.integrations.quantization import split_base
from smile_kernels.integrations.vllm import kv_sums, passes, reports, requests, routing, votes
from smile_kernels.integrations.vllm.linear import SmileLinearMethod, SmileQuantizationConfig
from smile_kernels.integrations.vllm.routing import RememberedRouting
from smile_kernels.integrations.vllm.votes import PromptRouting
from smile_kernels.nn import smile_layers
from smile_kernels.ops import library
from smile_kernels.upscaling import upscale_checkpoints, verify
from tests.integrations import tiny_models
from tests.integrations.tiny_models import build, fine_tuned
from tests.upscaling.test_quantized import INT8, adapter, quantised

# vLLM's CPU attention requires heads of 32; two ranks require an even number of key-value heads.
tiny_models.GROUPED.update(hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
tiny_models.CONFIGS["GPT2LMHeadModel"] = lambda: transformers.GPT2Config(
    n_embd=128, n_layer=2, n_head=4, vocab_size=96, **tiny_models.SPECIAL
)
tiny_models.CONFIGS["MistralForCausalLM"] = lambda: transformers.MistralConfig(
    **tiny_models.GROUPED, **tiny_models.SPECIAL, sliding_window=48
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_generate.py"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks on a machine with one NUMA node
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
TOKENS = 12
PROMPTS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
# Longer than a block of the KV cache, or a chunk of prefill, of 32 tokens; the last begins as the one before it.
LONG = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 40, 3, 150, 21)]
LONG.append(LONG[3][:100] + LONG[1])
TURN = (5, 7)  # begins a turn: two of these prompts have one, after another prompt
VOTING = [*LONG, LONG[0] + [*TURN] + LONG[2], LONG[3][:60] + [*TURN] + LONG[1], 6 * LONG[4]]
BLOCK = 128  # tokens, in vLLM's KV cache on a CPU
PER_REQUEST = {"additional_config": {"smile_expert_per_request": True}}
CHUNKS = {"max_num_batched_tokens": 32, "max_num_seqs": 3, "block_size": 32, "max_model_len": 256}


class Served(NamedTuple):
    folder: Path
    model: nn.Module
    tokens: list[list[int]]


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """architecture -> its checkpoint, the model and transformers' tokens, each created once."""
    made = {}

    def make(architecture: str) -> Served:
        if architecture not in made:
            base, work = build(architecture), tmp_path_factory.mktemp(architecture)
            for name, model in (("base", base), *((f"m{seed}", fine_tuned(base, seed)) for seed in (1, 2, 3))):
                model.save_pretrained(work / name)
            folder = work / "fused"
            upscale_checkpoints(
                work / "base",
                [work / "m1", work / "m2", work / "m3"],
                folder,
                rank_of_expert=4,
                rank_of_router=2,
                num_experts_per_tok=2 if "Mistral" in architecture else 1,
                exclude=["lm_head"],
            )
            assert {verdict.verdict for verdict in verify(folder)} <= {"exact", "truncated"}
            model = type(base).from_pretrained(folder)
            if "Qwen2" in architecture:
                make_parts_differ(model, base)
                model.save_pretrained(folder)
            words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
            words.pre_tokenizer = pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2").save_pretrained(folder)
            tokens = [greedy(model, prompt) for prompt in PROMPTS]
            assert tokens != [greedy(base, prompt) for prompt in PROMPTS]
            made[architecture] = Served(folder, model, tokens)
        return made[architecture]

    return make


def make_parts_differ(model: nn.Module, base: nn.Module) -> None:
    """The first merged layer has a separate router, a part of lower rank and a dense part. The second is uniform."""
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        layer = getattr(attention, name)
        factors = {key: p for key, p in layer.named_parameters() if key not in ("weight", "bias")}
        if name == "q_proj":
            g, changed = 1, {"router": factors["vh"].flip(0)[:, :1]}
        else:
            g, changed = 3, {"u": factors["u"][..., :2], "s": factors["s"][:, :2], "vh": factors["vh"][:, :3]}
        names = layer.expert_names
        layer = SmileLinear.from_factors(layer.weight, layer.bias, {**factors, **changed}, rank_of_router=g)
        layer.expert_names = names
        setattr(attention, name, layer)
    attention.v_proj = base.model.layers[0].self_attn.v_proj
    model.config.quantization_config = SmileConfig.from_layers(smile_layers(model)).to_dict()


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """Greedy tokens by transformers, without stopping at end-of-text tokens."""
    ids = torch.tensor([prompt])
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def in_a_process(function, *args):
    """The result of a call in a separate process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def in_vllm(folder, loras: tuple = (None,), prompts: list = PROMPTS, **options) -> list[list[list[int]]]:
    """Greedy tokens by one engine, in a separate process: for each adapter, for each prompt."""
    return in_a_process(_in_vllm, str(folder), loras, prompts, options)


def _in_vllm(folder: str, loras: tuple, prompts: list, options: dict) -> list[list[list[int]]]:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, **options}
    engine = LLM(folder, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = []
    for lora in loras:
        request = LoRARequest("adapter", 1, lora) if lora else None
        outputs = engine.generate(prompts, sampling, lora_request=request)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    if len(prompts[-1]["prompt_token_ids"]) > BLOCK:  # again, with its prefix in the cache
        (again,) = engine.generate(prompts[-1:], sampling, lora_request=request)
        assert again.num_cached_tokens >= BLOCK
        assert list(again.outputs[0].token_ids) == answers[-1][-1]
    assert_preempted(engine, options)
    return answers


def assert_preempted(engine, options: dict) -> None:
    """An engine with memory for little more than one of the longest prompts must preempt requests."""
    if "num_gpu_blocks_override" in options:
        (preemptions,) = (metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preemptions > 0


SMALL = {**CHUNKS, "num_gpu_blocks_override": 9, "disable_log_stats": False}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"tensor_parallel_size": 2}),
        ("LlamaForCausalLM", {"model_impl": "transformers"}),
        ("MistralForCausalLM", {"tensor_parallel_size": 2}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen2ForCausalLM", {"tensor_parallel_size": 2}),
        ("Phi3ForCausalLM", {}),
        ("Phi3ForCausalLM", {"tensor_parallel_size": 2}),
        ("GPT2LMHeadModel", {}),
        ("MixtralForCausalLM", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "one",
)
def test_the_same_tokens(architecture, options, served):
    case = served(architecture)
    assert in_vllm(case.folder, **options) == [case.tokens]


@pytest.mark.engine
def test_conv1d_layers_saved_from_memory(served, tmp_path):
    """transformers stores them as in memory, unlike the base's checkpoint; some of them are square."""
    case = served("GPT2LMHeadModel")
    case.model.save_pretrained(tmp_path)
    stored, base = (load_file(folder / "model.safetensors") for folder in (tmp_path, case.folder))
    square = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(stored[square], base[square].T)
    assert not torch.equal(stored[square], base[square])
    assert in_vllm(tmp_path) == [case.tokens]


def with_routing(folder: Path, to: Path, policy: RoutingPolicy) -> nn.Module:
    """The checkpoint with another policy, in `to`, and the model that transformers loads from there."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    if policy.calibrated:
        add_calibration(to, policy, seed=0)
    else:
        config = json.loads((to / "config.json").read_text())
        config["quantization_config"]["routing"] = policy.to_dict()
        (to / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(to)
    assert get_routing(model) == policy
    return model


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        (
            "LlamaForCausalLM",
            RoutingPolicy("causal", accumulate=True),
            SMALL,
        ),
        (
            "LlamaForCausalLM",
            RoutingPolicy("causal", accumulate=True, lock_after=1, calibrated=True, half_life=6),
            {"tensor_parallel_size": 2, **CHUNKS},
        ),
        (
            "LlamaForCausalLM",
            RoutingPolicy("causal", accumulate=True, calibrated=True, half_life=3, restart_at=tuple(LONG[3][31:33])),
            CHUNKS,
        ),
        # All in one pass: the last prompt begins on blocks that the pass itself fills.
        (
            "LlamaForCausalLM",
            RoutingPolicy("causal", accumulate=True, restart_at=tuple(LONG[3][60:61])),
            {"block_size": 32, "max_model_len": 256},
        ),
        ("LlamaForCausalLM", RoutingPolicy(accumulate=True, lock_after=1), {"model_impl": "transformers", **CHUNKS}),
        ("Qwen2ForCausalLM", RoutingPolicy("causal", accumulate=True), {"tensor_parallel_size": 2, **CHUNKS}),
        ("MistralForCausalLM", RoutingPolicy("causal", num_experts_per_tok=3, top_p=0.7), {"max_model_len": 256}),
        ("Qwen2ForCausalLM", RoutingPolicy(num_experts_per_tok=3, top_p=0.5), {"max_model_len": 256}),
    ],
    ids=[
        *("preempted", "locked-tp2", "half-life-restarts", "restarts-one-pass", "transformers", "parts-tp2"),
        *("sliding-window", "top_p"),
    ],
)
def test_routing_policies_with_sums(architecture, policy, options, served, tmp_path):
    case = served(architecture)
    model = with_routing(case.folder, tmp_path, policy)
    want = [greedy(model, prompt) for prompt in LONG]
    assert want != [greedy(case.model, prompt) for prompt in LONG]
    assert in_vllm(tmp_path, prompts=LONG, **options) == [want]


def reloaded(folder: Path, changed: Path, broken: list[Path], options: dict) -> tuple[list, list[str]]:
    """Greedy tokens before, after each wrong folder, after `changed`, and after `folder` again."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    extension = "smile_kernels.integrations.vllm.worker.SmileWorker"
    options = {"dtype": "float32", "max_model_len": 256, "worker_extension_cls": extension, **options}
    engine = LLM(str(folder), skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)

    def tokens() -> list[list[int]]:
        engine.reset_prefix_cache()
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in LONG], sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]

    answers, errors = [tokens()], []
    for one in broken:
        with pytest.raises(Exception, match="expected") as error:
            engine.collective_rpc("reload_experts", args=(str(one),))
        errors.append(str(error.value))
        answers.append(tokens())
    engine.collective_rpc("reload_experts", args=(str(changed),))
    answers.append(tokens())
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})  # vLLM's own
    answers.append(tokens())
    return answers, errors


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        ("LlamaForCausalLM", RoutingPolicy(), {}),
        ("Qwen2ForCausalLM", RoutingPolicy("causal", accumulate=True), {"enforce_eager": True, **CHUNKS}),
    ],
    ids=["compiled", "parts-causal"],
)
def test_experts_are_replaced_while_serving(architecture, policy, options, served, tmp_path):
    case = served(architecture)
    model = with_routing(case.folder, tmp_path / "a", policy)
    changed, less, cut = tmp_path / "changed", tmp_path / "less", tmp_path / "cut"
    want = [greedy(model, prompt) for prompt in LONG]
    if "Qwen2" in architecture:  # a separate router, which no new expert has
        other = type(model).from_pretrained(tmp_path / "a")
        for layer in smile_layers(other).values():
            for name in ("vh", "u", "router"):
                if getattr(layer, name) is not None:
                    getattr(layer, name).data = getattr(layer, name).data.flip(0)
            layer.s.data *= 2
    else:
        other = type(model).from_pretrained(tmp_path / "a")
        replace_expert(other, "m2", fine_tuned(build(architecture), 9))
    other.save_pretrained(changed)
    after = [greedy(other, prompt) for prompt in LONG]
    assert after != want
    remove_expert(other, "m1")
    other.save_pretrained(less)
    shutil.copytree(changed, cut)
    tensors = load_file(cut / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("up_proj.u"))
    save_file({name: t for name, t in tensors.items() if name != gone}, cut / "model.safetensors", {"format": "pt"})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(reloaded, tmp_path / "a", changed, [less, cut], options)
        answers, errors = job.result()
    assert answers == [want, want, want, after, want]
    assert "less: num_local_experts is 2; expected 3" in errors[0]
    assert f"cut: tensor {gone} is missing" in errors[1]


def by_request(folder: Path, asked: list, prompts: list, options: dict) -> tuple[list, list, str]:
    """Greedy tokens of one batch whose requests select experts, twice; cached tokens of the second run; an error."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 256, **options}
    engine = LLM(str(folder), skip_tokenizer_init=True, **options)

    def sampling(expert):
        extra = None if expert is None else {"expert": expert}
        return SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)

    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers, cached = [], []
    for _ in range(2):
        outputs = engine.generate(given, [sampling(expert) for expert in asked])
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        cached.append([output.num_cached_tokens for output in outputs])
    assert_preempted(engine, options)
    with pytest.raises(ValueError, match="expert: is") as error:
        engine.generate(given[:1], sampling("maths"))
    (after,) = engine.generate(given[:1], sampling(asked[0]))  # the engine continues
    assert list(after.outputs[0].token_ids) == answers[0][0]
    return answers, cached, str(error.value)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        ("LlamaForCausalLM", RoutingPolicy(), {"enforce_eager": True, **PER_REQUEST}),
        ("LlamaForCausalLM", RoutingPolicy(), PER_REQUEST),
        ("Qwen2ForCausalLM", RoutingPolicy("causal", accumulate=True), {"enforce_eager": True, **PER_REQUEST}),
    ],
    ids=["eager", "compiled", "causal"],
)
def test_each_request_its_expert(architecture, policy, options, served, tmp_path):
    """One long prompt with different experts, and others, in one batch; they do not share caches."""
    case = served(architecture)
    model = with_routing(case.folder, tmp_path, policy)
    asked = ["m1", None, "m3", 1, [0.5, 0.0, 0.75], {}, {"m1": 0.5, "m2": 0.5}]
    prompts = [LONG[3], LONG[3], LONG[3], LONG[0], LONG[3], LONG[2], LONG[3]]
    python = [dict(enumerate(expert)) if isinstance(expert, list) else expert for expert in asked]
    want = []
    for expert, prompt in zip(python, prompts):
        with routing_override(model, expert):
            want.append(greedy(model, prompt))
    assert len({tuple(tokens) for tokens, prompt in zip(want, prompts) if prompt is LONG[3]}) > 2
    answers, cached, error = in_a_process(by_request, tmp_path, asked, prompts, options)
    assert answers == [want, want]
    assert cached[0] == [0] * len(asked)
    assert [count >= BLOCK for count in cached[1]] == [prompt is LONG[3] for prompt in prompts]
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in error


class Int8Linear(nn.Linear):
    """A linear layer whose weight and input are rounded to 8 bits, with a scale per row."""

    def forward(self, x):
        scale, size = (t.abs().amax(-1, keepdim=True) / 127 for t in (self.weight, x))
        return ((x / size).round() @ (self.weight / scale).round().T) * size * scale.T


def asking(folder: Path, asked: list, prompts: list, options: dict) -> list[list[list[int]]]:
    """Greedy tokens if every request selects the same expert, for each of `asked`."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 64, **options}
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


class Fp8Linear(nn.Linear):
    """A linear layer whose input is rounded to float8, with a scale per row."""

    def forward(self, x):
        size = x.abs().amax(-1, keepdim=True) / 448
        return super().forward((x / size).to(torch.float8_e4m3fn).float() * size)


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
    asked = [{}, "a", "b", None]
    options = {"dtype": "bfloat16", "enforce_eager": True, **PER_REQUEST}
    answers = in_a_process(asking, tmp_path / "fused", asked, PROMPTS, options)
    near, far = 0.3 if method == "fp8" else 0.1, []  # adjacent numbers of float8 differ by a sixteenth or more
    for i, expert in enumerate(asked):
        with routing_override(model, expert):
            gaps = [apart(model, tokens) for tokens in answers]
        assert gaps.pop(i) < near
        far += gaps
    assert min(far) > 0.5


def voted(model: nn.Module, prompt: list[int]) -> tuple[int, list[int]]:
    """The expert chosen for a prompt in transformers, with scope "prompt", and its greedy tokens."""
    ids = torch.tensor([prompt])
    with watch_routing(model) as counts:
        model(ids)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return int(list(counts.values())[-1].argmax()), answer[0, len(prompt) :].tolist()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        # One pass for all votes, in which prompts begin on blocks that the pass fills.
        ("LlamaForCausalLM", RoutingPolicy("prompt", lock_after=1, calibrated=True), {"enforce_eager": True}),
        ("LlamaForCausalLM", RoutingPolicy("prompt", lock_after=1, restart_at=TURN), {}),
        (
            "LlamaForCausalLM",
            RoutingPolicy("prompt", half_life=20, restart_at=TURN),
            {"enforce_eager": True, **SMALL},
        ),
        (
            "Qwen2ForCausalLM",
            RoutingPolicy("prompt", lock_after=1, restart_at=TURN),
            {"enforce_eager": True, "tensor_parallel_size": 2, **CHUNKS},
        ),
        (
            "MistralForCausalLM",
            RoutingPolicy("prompt", calibrated=True, num_experts_per_tok=2),
            {"enforce_eager": True, "model_impl": "transformers"},
        ),
    ],
    ids=["one-pass", "compiled", "preempted", "parts-tp2", "two-experts"],
)
def test_prompts_that_vote(architecture, policy, options, served, tmp_path):
    """Including two turns, one of which begins as the other ends, and a request that selects its expert."""
    case = served(architecture)
    model = with_routing(case.folder, tmp_path, policy)
    asked = [None] * len(VOTING) + ["m2"]
    prompts = [*VOTING, VOTING[0]]
    winners, want = map(list, zip(*(voted(model, prompt) for prompt in VOTING)))
    assert len(set(winners)) > 1
    with routing_override(model, "m2"):
        want.append(greedy(model, VOTING[0]))
    answers, cached, error = in_a_process(by_request, tmp_path, asked, prompts, {"block_size": 32, **options})
    assert answers == [want, want]
    assert any(cached[1])
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in error


@pytest.mark.engine
def test_prompts_vote_in_half_precision(served, tmp_path):
    """Votes and evidence are float32 there too: each answer is that of the expert that float32 chooses."""
    model = with_routing(served("LlamaForCausalLM").folder, tmp_path, RoutingPolicy("prompt", lock_after=1))
    (answers,) = in_vllm(tmp_path, prompts=VOTING, dtype="bfloat16", max_model_len=256)
    for prompt, answer in zip(VOTING, answers):
        gaps = []
        for expert in range(3):
            with routing_override(model, expert), torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            gaps.append(float((logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).max()))
        assert min(gaps) == gaps[voted(model, prompt)[0]]


def asynchronously(folder: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy tokens of requests of AsyncLLM, streamed, while others are aborted; two choices of the first one."""
    os.environ.update({**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 32}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(folder, skip_tokenizer_init=True, max_num_seqs=3, **options))

    async def ask(name: str, prompt: list[int], **more) -> list[list[int]]:
        sampling = SamplingParams(
            top_k=1,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **more,
        )
        choices = [[] for _ in range(sampling.n)]
        async for output in engine.generate({"prompt_token_ids": prompt}, sampling, name):
            for each in output.outputs:
                choices[each.index] += each.token_ids
        return choices

    async def work() -> tuple:
        tasks = [asyncio.create_task(ask(f"left{i}", prompt)) for i, prompt in enumerate(prompts)]
        wanted = [asyncio.create_task(ask(f"{i}", prompt)) for i, prompt in enumerate(prompts)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        answers = [choices for (choices,) in await asyncio.gather(*wanted)]
        await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await ask("two", prompts[0], n=2)

    try:
        return asyncio.run(work())
    finally:
        engine.shutdown()


@pytest.mark.engine
def test_prompts_vote_under_asyncllm(served, tmp_path):
    model = with_routing(served("LlamaForCausalLM").folder, tmp_path, RoutingPolicy("prompt", lock_after=1))
    winners, want = map(list, zip(*(voted(model, prompt) for prompt in VOTING)))
    assert len(set(winners)) > 1
    assert in_a_process(asynchronously, str(tmp_path), VOTING) == (want, [want[0]] * 2)


def admitted(folder: str, options: dict) -> tuple:
    """The front end's handling of requests, without an engine: selections and salts, and two errors."""
    os.environ.update(ENVIRONMENT)
    from vllm import EngineArgs, SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    config = EngineArgs(folder, skip_tokenizer_init=True, dtype="float32", **options).create_engine_config()
    front = InputProcessor(pickle.loads(pickle.dumps(config)))  # as in another process

    def ask(**extra):
        prompt = {"type": "token", "prompt_token_ids": [3, 4, 5]}
        params = SamplingParams(extra_args=extra or None)
        return front.process_inputs("0", prompt, params, supported_tasks=("generate",))

    found, errors = [], []
    for expert in ("m2", 0, [0.5, 0.0, 2.0], {"m3": 1.0, 0: -1.0}, {}):
        try:
            request = ask(expert=expert)
            found.append((request.sampling_params.extra_args["expert"], request.cache_salt))
        except ValueError as error:
            errors.append(str(error))
    for expert in ("maths", [1.0]):
        with pytest.raises(ValueError, match="expert: ") as error:
            ask(expert=expert)
        errors.append(str(error.value))
    plain = ask(), ask(other=1)
    assert [request.cache_salt for request in plain] == [None, None]
    return found, errors


@pytest.mark.engine
def test_the_front_end_checks_what_requests_ask_for(served):
    """With a configuration of vLLM that was sent to another process."""
    folder = str(served("LlamaForCausalLM").folder)
    found, errors = in_a_process(admitted, folder, PER_REQUEST)
    none, refused = in_a_process(admitted, folder, {})
    asked = [[(1, 1.0)], [(0, 1.0)], [(2, 2.0), (0, 0.5)], [(2, 1.0), (0, -1.0)], [(0, 0.0)]]
    assert [expert for expert, _ in found] == asked
    assert [salt for _, salt in found] == [f"|expert={each}" for each in [*asked[:4], []]]
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in errors[0]
    assert "expert: has 1 weights; expected 3, one for each expert" in errors[1]
    assert none == []
    assert (
        "expert: is 'm2'; expected none, since this engine's layers do not look for it (with --additional-config"
        in refused[0]
    )


@pytest.mark.parametrize("policy", [None, RoutingPolicy(accumulate=True)], ids=["published", "layers"])
@pytest.mark.parametrize("names", [("o",), ("q", "k", "v")], ids=["one", "merged"])
@torch.no_grad()
def test_a_layer_takes_what_the_requests_of_a_pass_ask_for(names, policy):
    """Three requests of 2, 1 and 3 tokens and padding at the end; the router chooses for the second one."""
    p, n, r, o, d = len(names), 3, 4, 6, 10
    routing = policy and remembered(policy, 16, p)
    asking = requests.RequestedExperts(n, ("math", "code", "chat"))
    entry = SmileModuleConfig(r, 2, expert_bias=True)
    method = SmileLinearMethod(dict.fromkeys(names, entry), n, 2, routing, asking)
    method.rows, method.first, layer = [o] * p, 0, nn.Module()
    shapes = {"weight": (p * o, d), "vh": (p, n, r, d), "s": (p, n, r), "u": (n, p * o, r), "expert_bias": (n, p * o)}
    for name, shape in shapes.items():
        layer.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
    weight, factors = (
        layer.weight.clone(),
        [layer.vh.clone(), layer.s.clone(), layer.u.clone(), layer.expert_bias.clone()],
    )
    method.process_weights_after_loading(layer)
    x, want = torch.randn(8, d), []
    own = method.compute(layer, x, None)
    asked = [asking.check(expert) for expert in ({"code": 0.5, 0: 0.25, 2: 2.0}, [0.0, 0.0, 1.0])]
    asking.begin([asked[0], None, asked[1]], np.array([2, 1, 3]), x.device)
    got = method.compute(layer, x, None)
    for weights in ({1: 0.5, 0: 0.25, 2: 2.0}, {2: 1.0}):
        y = x @ weight.T
        for i, w in weights.items():
            vh, s, u, bias = factors
            parts = [(x @ vh[j, i].T * s[j, i]) @ u[i, j * o : (j + 1) * o].T for j in range(p)]
            y = y + w * (torch.cat(parts, -1) + bias[i])
        want.append(y)
    want = torch.cat([want[0][:2], own[2:3], want[1][3:6], own[6:]])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    asking.begin([None, None], np.array([5, 3]), x.device)
    torch.testing.assert_close(method.compute(layer, x, None), own)
    asking.begin([asked[1], None], np.array([5, 1]), x.device)
    with pytest.raises(RuntimeError, match="a SMILE layer has 5 tokens in a pass of 6; expected as many"):
        method.compute(layer, x[:5], None)


def test_engines_whose_requests_cannot_choose_say_why():
    config = SimpleNamespace(
        use_v2_model_runner=False,
        model_config=SimpleNamespace(is_multimodal_model=False, is_encoder_decoder=False),
        parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        **PER_REQUEST,
    )
    assert requests.why_not(config) is None
    request = SimpleNamespace(sampling_params=SamplingParams(extra_args={"expert": 1}), cache_salt="mine")
    vllm_config().admit(request, config)
    assert request.cache_salt == "mine|expert=[(1, 1.0)]"
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    assert "--enforce-eager" in requests.why_not(config)
    config.use_v2_model_runner = True
    assert "V2 model runner" in requests.why_not(config)


@torch.no_grad()
def test_a_compiled_layer_reads_what_the_runner_says_of_each_pass(monkeypatch):
    """The graph of one pass runs for the next, with other selections, and then for one without any."""
    asking, (n, r, o, d) = requests.RequestedExperts(2, ("math", "code")), (2, 3, 5, 7)
    method = SmileLinearMethod({"o": SmileModuleConfig(r, 2)}, n, 1, None, asking)
    method.rows, layer = [o], nn.Module()
    shapes = {"weight": (o, d), "vh": (1, n, r, d), "s": (1, n, r), "u": (n, o, r)}
    for name, shape in shapes.items():
        layer.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
    method.process_weights_after_loading(layer)
    layer.quant_method = method
    context = SimpleNamespace(no_compile_layers={"o": layer})
    monkeypatch.setattr(requests, "get_forward_context", lambda: context)
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled, x = torch.compile(method.apply, fullgraph=True, backend=record), torch.randn(4, d)
    torch._dynamo.mark_dynamic(x, 0)

    def execute(self, tokens):
        assert GPUModelRunner._prepare_inputs(self, None, np.array(tokens)) == "prepared"
        return compiled(layer, x)

    monkeypatch.setattr(GPUModelRunner, "_prepare_inputs", lambda self, output, tokens: "prepared")
    monkeypatch.setattr(GPUModelRunner, "execute_model", execute)
    passes.follow_passes()
    passes.follow_passes()  # once more changes nothing
    smile = SmileQuantizationConfig(SmileConfig(2, 1, r, 2, {}))
    smile.requests = asking
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(quant_config=smile),
        input_batch=SimpleNamespace(req_ids=["b", "a"]),
        device=x.device,
    )

    def run(a, b):
        params = {name: SamplingParams(extra_args=e and {"expert": e}) for name, e in (("a", a), ("b", b))}
        runner.requests = {name: SimpleNamespace(sampling_params=each) for name, each in params.items()}
        return GPUModelRunner.execute_model(runner, [3, 1])  # "b" comes first in the batch, with 3 tokens

    own = run(None, None)
    experts = [x @ layer.weight.T + (x @ layer.vh[0, i].T * layer.s[0, i]) @ layer.u[i].T for i in range(n)]
    torch.testing.assert_close(run([[1, 1.0]], [[0, 1.0]]), torch.cat([experts[0][:3], experts[1][3:]]))
    torch.testing.assert_close(run([[0, 1.0]], None), torch.cat([own[:3], experts[0][3:]]))
    torch.testing.assert_close(run(None, None), own)
    assert asking.rows is None
    assert len(graphs) == 1


@pytest.mark.engine
@pytest.mark.parametrize(
    "policy",
    [RoutingPolicy(), RoutingPolicy("causal", accumulate=True), RoutingPolicy("prompt", lock_after=1)],
    ids=["token", "causal", "prompt"],
)
def test_the_same_tokens_with_and_without_a_lora_adapter(policy, served, tmp_path):
    case = served("LlamaForCausalLM")
    model, generator, tensors = with_routing(case.folder, tmp_path / "model", policy), torch.Generator(), {}
    want = [voted(model, prompt)[1] for prompt in PROMPTS]
    for i, layer in enumerate(model.model.layers):
        for name in ("q_proj", "o_proj"):
            a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((8, 128), (128, 8)))
            key = f"base_model.model.model.layers.{i}.self_attn.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            getattr(layer.self_attn, name).weight.data += 2 * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain, adapted = in_vllm(tmp_path / "model", (None, str(tmp_path)), enable_lora=True, max_lora_rank=8)
    assert plain == want
    assert adapted == [voted(model, prompt)[1] for prompt in PROMPTS] != want


@pytest.mark.engine
@pytest.mark.parametrize(
    "policy", [RoutingPolicy(), RoutingPolicy("causal", accumulate=True, lock_after=1)], ids=["token", "causal"]
)
def test_the_example_compiles_the_model(policy, served, tmp_path):
    model = with_routing(served("LlamaForCausalLM").folder, tmp_path / "model", policy)
    prompt = " ".join(f"t{token}" for token in PROMPTS[0])
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "model"), "--prompt", prompt, "--dtype", "float32"],
        env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(tmp_path), "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "saved AOT compiled function" in done.stdout + done.stderr
    want = greedy(model, PROMPTS[0], 32)
    want = want[: want.index(2)] if 2 in want else want
    assert done.stdout.splitlines()[-1].split() == [f"t{token}" for token in want]


def over_http(folder: Path, requests: list[dict], log: Path, *options: str) -> list[Any]:
    """The OpenAI server's response to each request for completions, including errors, and the text of its metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager", *options]

    def ask(**more) -> dict:
        body = {"model": str(folder), "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}
        url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        try:
            return json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)))
        except urllib.error.HTTPError as error:
            return json.load(error)

    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            while True:
                assert server.poll() is None, log.read_text()[-4000:]
                try:
                    answers = [ask(**request) for request in requests]
                    return [*answers, urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()]
                except urllib.error.URLError:
                    assert time.monotonic() < deadline, log.read_text()[-4000:]
                    time.sleep(1)
        finally:
            server.terminate()
            server.wait()


def texts(answer: dict) -> list[list[int]]:
    """The tokens of each choice, by their texts."""
    return [[int(word.removeprefix("t")) for word in choice["text"].split()] for choice in answer["choices"]]


@pytest.mark.engine
def test_openai_server(served, tmp_path):
    case = served("MistralForCausalLM")
    answer, metrics = over_http(case.folder, [{"prompt": PROMPTS}], tmp_path / "log")
    assert texts(answer) == case.tokens
    assert answer["kv_transfer_params"] is None
    assert "smile_expert_tokens" not in metrics


@pytest.mark.engine
def test_openai_server_whose_prompts_vote(served, tmp_path):
    """The server reports the experts of each request, and counts their tokens."""
    model = with_routing(served("LlamaForCausalLM").folder, tmp_path / "model", RoutingPolicy("prompt", lock_after=1))
    short = [prompt for prompt in VOTING if len(prompt) < 50]
    winners, want = map(list, zip(*(voted(model, prompt) for prompt in short)))
    assert len(set(winners)) > 1
    asked = [{"prompt": short}, *({"prompt": short[0], "vllm_xargs": {"expert": name}} for name in ("m2", "maths"))]
    options = "--additional-config", json.dumps({reports.FLAG: True})
    *answers, metrics = over_http(tmp_path / "model", asked, tmp_path / "log", *options)
    assert texts(answers[0]) == want
    chosen = [f"m{winner + 1}" for winner in winners]
    told = [answer["kv_transfer_params"] for answer in answers[:2]]
    assert told == [{"smile_experts": {chosen[0]: 1}}, {"smile_experts": {"m2": 1}}]
    tokens = dict.fromkeys(chosen, 0) | {"m2": len(short[0]) + TOKENS}
    for name, prompt in zip(chosen, short):
        tokens[name] += len(prompt) + TOKENS
    counted = re.findall(r'smile_expert_tokens_total{expert="(\w+)"} ([\d.]+)', metrics)
    assert {name: float(count) for name, count in counted} == tokens
    with routing_override(model, "m2"):
        assert texts(answers[1]) == [greedy(model, short[0])]
    error = answers[2]["error"]
    assert error["code"] == 400
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in error["message"]


@pytest.mark.engine
@pytest.mark.parametrize(
    "lost", [["q_proj.u", "k_proj.vh", "v_proj.s", "v_proj.expert_bias"], ["o_proj.weight"]], ids=lambda lost: lost[0]
)
def test_missing_tensors_are_an_error(lost, served, tmp_path):
    folder = served("Qwen2ForCausalLM").folder
    names = [f"model.layers.1.self_attn.{name}" for name in lost]
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k not in names}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint: missing, or with NaN in them: (.*)") as error:
        in_vllm(tmp_path)
    assert sorted(re.search("in them: (.*)", str(error.value))[1].split(", ")) == sorted(names)


def vllm_config(**options) -> QuantizationConfig:
    modules = {"lm_head": SmileModuleConfig(4, 2)}
    return SmileQuantizationConfig.from_config(SmileConfig(3, 1, 4, 2, modules, **options).to_dict())


def test_routing_by_whole_sequences_is_refused():
    with pytest.raises(
        NotImplementedError, match=r"scope: is 'sequence'.* expected scope 'prompt', 'causal' or 'token'"
    ):
        vllm_config(routing=RoutingPolicy("sequence"))


@pytest.mark.engine
def test_engines_that_cannot_carry_routing_are_refused(served, tmp_path):
    with_routing(served("LlamaForCausalLM").folder, tmp_path, RoutingPolicy("causal"))
    ports = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(NotImplementedError, match=r"kv_transfer_config: does not go with .*scope='causal'"):
        in_vllm(tmp_path, kv_transfer_config=ports)
    with pytest.raises(ValueError, match="smile_report_experts: is True, and layers choose an expert for each token"):
        in_vllm(served("LlamaForCausalLM").folder, additional_config={reports.FLAG: True})


def remembered(policy: RoutingPolicy, tokens: int, routers: int) -> RememberedRouting:
    """A policy's state without an engine, with 3 experts of which 2 are chosen, and poisoned buffers."""
    routing = RememberedRouting(policy, 3, 2)
    if policy.scope == "causal":
        routing.cache = kv_sums.SumsCache("smile_routing.1", lambda: 3 * routers, None)
    routing.cache_name, routing.names = "smile_routing.1", [f"layers.{i}.mlp" for i in range(routers)]
    routing.evidence, routing.weights = torch.full((tokens, 3), torch.nan), torch.full((tokens, 2), torch.nan)
    routing.ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    return routing


@pytest.mark.parametrize(
    ("parts", "policy", "op"),
    [
        (1, None, "smile_kernels.linear"),
        (3, None, "smile_kernels.delta_"),
        (3, RoutingPolicy("causal", accumulate=True, lock_after=2, calibrated=True), "smile_kernels.delta_"),
    ],
    ids=["one", "merged", "causal"],
)
@torch.no_grad()
def test_a_layer_is_one_graph_that_calls_our_kernels(parts, policy, op, monkeypatch):
    """Traced as by vLLM, for any number of tokens: reads on the host or data-dependent shapes would raise."""
    monkeypatch.setattr(library, "choose_backend", lambda *_: "triton")  # as on a GPU
    routing = policy and remembered(policy, 16, parts)
    entry = SmileModuleConfig(4, 2, expert_bias=True)
    method = SmileLinearMethod({f"part{i}": entry for i in range(parts)}, 3, 2, routing)
    method.first, method.rows, layer, graphs = 0, [64] if parts == 1 else [40, 16, 8], nn.Module(), []
    shapes = {"weight": (64, 32), "vh": (parts, 3, 4, 32), "u": (3, 64, 4), "expert_bias": (3, 64)}
    layer.__dict__ |= {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    layer.__dict__ |= {"s": torch.zeros(parts, 3, 4), "router": None, "router_prior": torch.zeros(parts, 3)}
    method._find_router(layer)

    def record(graph, inputs):
        graphs.append(graph.graph)
        (outputs,) = graph.graph.output_node().args
        return lambda *_: [torch.empty(0)] * len(outputs)

    x = torch.empty(7, 32, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    torch.compile(method.apply, fullgraph=True, backend=record)(layer, x)
    (graph,) = graphs
    assert not {"item", "tolist", "cpu", "nonzero"} & {node.target for node in graph.nodes}
    calls = [node for node in graph.nodes if str(node.target).startswith(("smile_kernels.", "vllm."))]
    names = [str(call.target).removesuffix(".default") for call in calls]
    assert names == (["vllm.smile_running_sums"] if policy else []) + [op]
    assert calls[-1].args[-1] == "triton"
    ((y,),) = graph.output_node().args
    y = y.meta["example_value"]
    assert isinstance(y.shape[0], torch.SymInt)
    assert y.shape[1] == 64


@pytest.mark.parametrize(("op", "given"), [("smile_running_sums", ["sums"]), ("smile_vote", ["weights", "ids"])])
def test_what_runs_between_cuda_graphs_writes_where_the_next_reads(op, given):
    """A new tensor would have another address in each pass, while a captured graph reads the address at capture."""
    schema = getattr(torch.ops.vllm, op).default._schema
    assert schema.returns == []
    assert [argument.name for argument in schema.arguments if argument.is_write] == given


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_sums_read_nothing_on_the_host(gamma, monkeypatch):
    """Operators between CUDA graphs, on tensors without values: three requests, two of them continued, and padding."""
    with FakeTensorMode():
        slots, blocks, lengths = (torch.empty(n, dtype=torch.int32) for n in (9, 6, 3))
        common = CommonAttentionMetadata(
            query_start_loc=torch.empty(4, dtype=torch.int32),
            query_start_loc_cpu=torch.empty(4, dtype=torch.int32),
            seq_lens=lengths,
            num_reqs=3,
            num_actual_tokens=8,
            max_query_len=5,
            max_seq_len=40,
            block_table_tensor=blocks.view(3, 2),
            slot_mapping=slots.long(),
        )
        spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=6, head_size_v=0, dtype=torch.float32)
        cache = kv_sums.SumsCache("sums", lambda: 6, (5,))
        cache.restarts = torch.empty(8, dtype=torch.bool)
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"sums": cache}))
        metadata = kv_sums.SumsMetadataBuilder(spec, ["sums"], config, torch.device("cpu")).build(0, common)
        pages = torch.empty(5, 1, 32, 6)
        monkeypatch.setattr(kv_sums, "get_attention_context", lambda name: (metadata, None, pages, common.slot_mapping))
        kv_sums.smile_running_sums(torch.empty(9, 1, 3), torch.empty(9, 1, 3), 1, gamma, "smile_routing.1")


def test_requests_that_begin_on_blocks_of_the_same_pass():
    """Row 1 begins after two blocks that row 0 fills, row 2 after one of row 1's; rows 3 and 4 are independent."""
    table = np.array([[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 4, 6], [7, 8, 0, 0], [9, 10, 0, 0]], np.int32)
    computed, counts = np.array([0, 8, 12, 4, 6], np.int32), np.array([10, 8, 2, 3, 1], np.int32)
    assert kv_sums.longest_chain(table, 4, computed, counts) == 2
    assert kv_sums.longest_chain(table[3:], 4, computed[3:], counts[3:]) == 0


def test_tokens_that_complete_a_pattern_across_the_borders_of_passes():
    ids = np.array([[7, 8, 7, 8, 9], [8, 7, 8, 0, 0], [7, 0, 0, 0, 0]])
    computed, counts = np.array([1, 0, 0], np.int32), np.array([4, 3, 1], np.int32)
    found = kv_sums.complete((7, 8), ids, computed, counts)
    assert found.tolist() == [True, False, True, False, False, False, True, False]
    assert kv_sums.complete((8,), ids, computed, counts).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]


def test_requests_wait_for_the_vote_on_their_prompt():
    """Two requests with one prompt share a vote; the choice is in their cache salts; withdrawn ones have none."""

    def request(name: str, prompt: list[int]) -> Request:
        salt = SamplingParams(max_tokens=4), None
        return Request(name, prompt, *salt, block_hasher=lambda one: [] if one.block_hashes else [one.cache_salt])

    pending, a, b, c = votes.Pending(2), request("a", [3, 4]), request("b", [3, 4]), request("c", [3, 5])
    vote, none, other = map(pending.begin, (a, b, c))
    assert none is None
    assert vote.prompt_token_ids == a.prompt_token_ids
    assert vote.block_hashes == ["|expert=vote"]
    assert (vote.max_tokens, vote.sampling_params.extra_args) == (1, {"expert": "vote"})
    assert pending.end(SimpleNamespace(request_id="a")) is None
    values = np.log(np.array([[0.25, 0.25, 0.75]]))
    values = np.append(values, [[-np.inf]], axis=1)
    logprobs = SimpleNamespace(logprob_token_ids=np.array([[2, 2, 0, 1]]), logprobs=values)
    assert pending.end(SimpleNamespace(request_id=vote.request_id, new_token_ids=[2], new_logprobs=logprobs)) == [a, b]
    for one in (a, b):
        assert one.sampling_params.extra_args["expert"] == [(0, pytest.approx(0.75)), (2, pytest.approx(0.25))]
        assert one.block_hashes == [one.cache_salt] != [None]
    assert pending.withdraw({"a"}) == ([], set())
    assert pending.withdraw({"c"}) == ([c], {other.request_id})
    assert not pending.prompts | pending.waiting


def test_outputs_carry_the_experts_of_their_requests(monkeypatch):
    """Those of requests that selected some, the largest weight first, with what a connector has put there."""
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, passed, outputs: outputs)
    reports.report_experts()
    asked = {"a": [(0, 0.25), (2, 0.75)], "b": [(0, 0.0)], "c": None, "d": votes.VOTE}
    params = {name: SimpleNamespace(extra_args=one and {"expert": one}) for name, one in asked.items()}
    outputs = [SimpleNamespace(request_id=name, kv_transfer_params=None) for name in (*asked, "gone")]
    outputs[1].kv_transfer_params = {"port": 1}
    for names, told in ((("x", "y", "z"), {"z": 0.75, "x": 0.25}), (None, {"2": 0.75, "0": 0.25})):
        config = SimpleNamespace(quant_config=vllm_config(expert_names=names), additional_config={})
        scheduler = SimpleNamespace(
            vllm_config=config,
            requests={name: SimpleNamespace(sampling_params=one) for name, one in params.items()},
        )
        passed = SimpleNamespace(num_scheduled_tokens=dict.fromkeys((*asked, "gone"), 1))
        each = copy.deepcopy(outputs)
        Scheduler.update_from_output(scheduler, passed, {0: SimpleNamespace(outputs=each)})
        assert each == outputs
        config.additional_config = {reports.FLAG: True}
        Scheduler.update_from_output(scheduler, passed, {0: SimpleNamespace(outputs=each)})
        assert list(each[0].kv_transfer_params["smile_experts"].items()) == list(told.items())
        assert each[1].kv_transfer_params == {"port": 1, "smile_experts": {}}
        assert [output.kv_transfer_params for output in each[2:]] == [None] * 3


def test_votes_take_the_place_of_logits():
    routing = PromptRouting(RoutingPolicy("prompt", num_experts_per_tok=3, top_p=0.8), 4, 3)
    routing.evidence = torch.tensor([[0.0] * 4, [0.1, 0.6, 0.1, 0.2], [0.5] * 4, [0.001, 0.002, 0.9, 0.097]]).log()
    logits = torch.randn(3, 7)
    assert routing.cast(logits) is logits
    routing.votes = torch.tensor([1, 3]), torch.tensor([0, 2])  # the first and the third request
    want = torch.full((3, 7), -torch.inf)
    want[0, [1, 3]], want[1], want[2, 2] = torch.tensor([0.75, 0.25]).log(), logits[1], 0.0
    torch.testing.assert_close(routing.cast(logits.clone()), want)


@torch.no_grad()
def test_layers_score_where_somebody_votes(monkeypatch):
    """A pass with only votes ends at the first layer after the voting blocks; the runner continues with any states."""
    routing, layers, x = PromptRouting(RoutingPolicy("prompt", lock_after=1), 3, 1), [], torch.randn(4, 6)
    routing.evidence, routing.weights = torch.full((8, 3), torch.nan), torch.ones(8, 1)
    routing.ids = torch.tensor([[2], [-1], [0], [1]] * 2, dtype=torch.int32)
    monkeypatch.setattr(votes, "get_forward_context", lambda: SimpleNamespace(attn_metadata={}))
    for i in range(3):
        method = SmileLinearMethod({f"layers.{i}.mlp": SmileModuleConfig(2, 1)}, 3, 1, routing)
        method.first, method.rows, layer = len(routing.names), [5], nn.Module()
        routing.names += method.names
        shapes = {"weight": (5, 6), "vh": (1, 3, 2, 6), "s": (1, 3, 2), "u": (3, 5, 2)}
        for name, shape in shapes.items():
            layer.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
        layers.append((method, layer))
    for method, layer in layers:
        method._find_router(layer)
    assert [method.votes for method, _ in layers] == [True, True, False]

    def run() -> None:
        for method, layer in layers:
            y = x @ layer.weight.T
            for t, i in ((0, 2), (2, 0), (3, 1)):
                y[t] += (x[t] @ layer.vh[0, i].T * layer.s[0, i]) @ layer.u[i].T
            torch.testing.assert_close(method.compute(layer, x, None), y)

    run()
    assert routing.evidence.isnan().all()
    routing.votes = torch.tensor([1]), torch.tensor([1])
    run()
    scores = (x @ layers[0][1].vh[0, :, 0].T).square()
    logs = (scores / scores.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(routing.evidence[:4], logs - logs.amax(-1, keepdim=True))
    routing.only_votes = True
    with pytest.raises(votes.HasVoted):
        run()

    def forward(self, **inputs):
        raise votes.HasVoted

    monkeypatch.setattr(GPUModelRunner, "_model_forward", forward)
    monkeypatch.setattr(GPUModelRunner, "_sample", lambda self, logits, drafts: logits)
    votes.follow_votes()
    model = SimpleNamespace(get_hidden_size=lambda: 6, dtype=torch.bfloat16)
    smile = vllm_config(routing=routing.policy)
    smile.routing = routing
    runner = SimpleNamespace(model_config=model, device=x.device, vllm_config=SimpleNamespace(quant_config=smile))
    states = GPUModelRunner._model_forward(runner, positions=torch.arange(4))
    assert (states.shape, states.dtype) == ((4, 6), torch.bfloat16)
    assert not routing.only_votes


def test_what_cannot_vote_says_why():
    routing = PromptRouting(RoutingPolicy("prompt", restart_at=(5,)), 3, 1)
    config = SimpleNamespace(additional_config={})
    plain = {"resumable": False, "prompt_embeds": None}
    routing.admit(SimpleNamespace(**plain), None, config)
    routing.admit(SimpleNamespace(**{**plain, "resumable": True}), [(0, 1.0)], config)
    for given, asked, message in [
        ({"resumable": True}, None, "expert: is not given for a prompt in parts"),
        (
            {"prompt_embeds": torch.ones(2, 3)},
            None,
            r"expert: is not given for prompt_embeds, in which restart_at \[5\]",
        ),
        ({}, [(0, 0.5), (1, 0.5)], "expert: has 2 experts; expected at most 1, as many as"),
    ]:
        with pytest.raises(ValueError, match=message):
            routing.admit(SimpleNamespace(**{**plain, **given}), asked, config)
    routing.admit(SimpleNamespace(**plain), [(0, 0.5), (1, 0.5)], SimpleNamespace(**PER_REQUEST))


def test_engines_whose_prompts_cannot_vote_are_refused():
    sizes = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
    parallel = dict.fromkeys(sizes, 1) | {"use_ubatching": False, "use_sequence_parallel_moe": False}
    model = {"runner_type": "generate", "is_multimodal_model": False, "is_encoder_decoder": False}
    parts = {
        "parallel_config": parallel,
        "model_config": model,
        "scheduler_config": {"async_scheduling": True, "get_scheduler_cls": lambda: Scheduler},
        "cache_config": {"kv_sharing_fast_prefill": False},
    }

    def refused(part: str = "model_config", **changed) -> list[str]:
        given = {
            name: SimpleNamespace(**{**values, **(changed if name == part else {})}) for name, values in parts.items()
        }
        found = PromptRouting(RoutingPolicy("prompt"), 3, 1)._refused(SimpleNamespace(kv_transfer_config=None, **given))
        return [name for name, (is_given, _) in found.items() if is_given]

    assert refused() == []
    for part, name, value, said in [
        ("model_config", "runner_type", "pooling", "runner"),
        ("model_config", "is_multimodal_model", True, "model"),
        ("scheduler_config", "get_scheduler_cls", lambda: object, "scheduler_cls"),
        ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("parallel_config", "use_sequence_parallel_moe", True, "enable_expert_parallel"),
    ]:
        assert refused(part, **{name: value}) == [said]


@pytest.mark.parametrize(
    ("owner", "name", "patch"),
    [
        (Scheduler, "update_from_output", votes.vote_first),
        (Scheduler, "update_from_output", reports.report_experts),
        (OutputProcessor, "process_outputs", reports.count_tokens),
        (Request, "update_block_hashes", votes.vote_first),
        (GPUModelRunner, "_sample", votes.follow_votes),
        (GPUModelRunner, "_prepare_inputs", passes.follow_passes),
        (VllmConfig, "_get_v2_model_runner_unsupported_features", passes.choose_the_runner),
    ],
)
def test_another_vllm_is_named(owner, name, patch, monkeypatch):
    patch()
    monkeypatch.setattr(owner, name, None)
    with pytest.raises(
        ImportError, match=rf"vllm: is \S+; expected {owner.__name__}\.{name}, as in 0\.32\.0 to 0\.33\.0"
    ):
        patch()


def test_vllm_takes_the_runner_that_says_what_a_pass_has():
    parallel = SimpleNamespace(distributed_executor_backend=None, pipeline_parallel_size=1, use_ubatching=False)
    config = SimpleNamespace(speculative_config=None, parallel_config=parallel, additional_config={})
    for quantization, needs in [
        (None, []),
        (vllm_config(), []),
        (vllm_config(routing=RoutingPolicy("prompt")), ["routing with scope 'prompt' of SMILE models"]),
    ]:
        config.quant_config = quantization
        assert VllmConfig._get_v2_model_runner_unsupported_features(config) == needs
    config.additional_config = PER_REQUEST["additional_config"]
    assert len(VllmConfig._get_v2_model_runner_unsupported_features(config)) == 2


def test_layers_in_another_order_than_they_were_built_are_refused():
    routing = remembered(RoutingPolicy(accumulate=True), 4, 3)
    for first in (0, 1, 0, 1, 2):  # a failed pass, and a complete one
        weights, ids = routing.choose(torch.rand(4, 1, 3), first, 1)
        assert weights.shape == ids.shape == (4, 1, 2)
        assert not routing.evidence.isnan().any()
    with pytest.raises(RuntimeError, match="routing: router 1 runs where router 3 is due"):
        routing.choose(torch.rand(4, 1, 3), 1, 1)


def test_files_are_held_against_the_config_before_weights_are_read(tmp_path):
    module = SmileModuleConfig(4, 2, expert_bias=True, router=True)
    config = SmileQuantizationConfig(SmileConfig(3, 1, 4, 2, {"a.q_proj": module}))
    shapes = {"vh": (3, 4, 8), "s": (3, 4), "u": (3, 6, 4), "expert_bias": (3, 6), "router": (3, 2, 8)}
    wrong = {"vh": (3, 8, 8), "s": (4, 4), "u": (3, 6, 8), "expert_bias": (4, 6), "router": (3, 3, 8)}
    file = tmp_path / "model-00001.safetensors"

    def write(shapes):
        save_file({f"a.q_proj.{name}": torch.zeros(shape) for name, shape in shapes.items()}, file)

    write(shapes)
    config.maybe_update_config(str(tmp_path))
    config.maybe_update_config("org/of-the-hub")
    for name, shape in wrong.items():
        write({**shapes, name: shape})
        found = rf"{file}: tensor 'a.q_proj.{name}' has shape {re.escape(str(list(shape)))}; expected \[3, .*as quantiz"
        with pytest.raises(ValueError, match=found):
            config.maybe_update_config(str(tmp_path))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{file}: is not a whole safetensors file"):
        config.maybe_update_config(str(tmp_path))


def test_experts_without_their_base_are_refused():
    with pytest.raises(ValueError, match=r"base_model_name_or_path: is '/base'; .* expected a whole checkpoint"):
        vllm_config(base_model_name_or_path="/base")


def test_a_base_of_torchao_is_refused():
    config = SmileConfig(2, 1, 3, 2, {"q": SmileModuleConfig(3, 2)}, base={"quant_method": "torchao"})
    with pytest.raises(ValueError, match="base: is stored as 'torchao', which the plugin does not load"):
        SmileQuantizationConfig.from_config(config.to_dict())


def test_experts_of_a_head_are_refused():
    with pytest.raises(ValueError, match=r"modules: lm_head is a Embedding in vLLM; expected a linear layer"):
        vllm_config().get_quant_method(nn.Embedding(3, 2), "lm_head")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"static_forward_context": None}, r"CompilationConfig\.static_forward_context, a dict"),
        ({"splitting_ops": {"attention": True}}, r"CompilationConfig\.splitting_ops, a list of names"),
        ({"splitting_ops": ["unified_attention"]}, r"CompilationConfig\.splitting_ops, a list of names"),
    ],
)
def test_another_compilation_config_is_named(changed, message):
    compilation = CompilationConfig()
    routing._check_compilation(compilation)
    for name, value in changed.items():
        object.__setattr__(compilation, name, value)
    with pytest.raises(ImportError, match=rf"vllm: is \S+; expected {message}.*, as in 0\.32\.0 to 0\.33\.0"):
        routing._check_compilation(compilation)
