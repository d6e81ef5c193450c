"""SMILE checkpoints and vLLM engines in processes of their own, for the tests of vLLM: `make test-vllm`."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from vllm import SamplingParams

from smile_kernels import RoutingPolicy, SmileLinear, get_routing, watch_routing
from smile_kernels.checkpoint import add_calibration
from smile_kernels.config import SmileConfig
from smile_kernels.nn import smile_layers
from smile_kernels.upscaling import upscale_checkpoints, verify
from tests.integrations import tiny_models
from tests.integrations.tiny_models import build, fine_tuned

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


@functools.cache
def served(architecture: str) -> Served:
    """The checkpoint of an architecture, its model and transformers' tokens, created once in a process."""
    base, work = build(architecture), Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, work, ignore_errors=True)
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
    return Served(folder, model, tokens)


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
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, **options}
    avoid_int8_tiles(options)
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


def avoid_int8_tiles(options: dict) -> None:
    """In float32 vLLM's int8 kernel for AMX fails, with or without SMILE layers; its other one is for all dtypes."""
    if options["dtype"] == "float32":
        torch.cpu._is_amx_tile_supported = lambda: False


def assert_preempted(engine, options: dict) -> None:
    """An engine with memory for little more than one of the longest prompts must preempt requests."""
    if "num_gpu_blocks_override" in options:
        (preemptions,) = (metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preemptions > 0


SMALL = {**CHUNKS, "num_gpu_blocks_override": 9, "disable_log_stats": False}


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
    assert get_routing(model) == replace(policy, num_experts_per_tok=None)  # which the layers have
    m = policy.num_experts_per_tok
    assert m is None or {layer.num_experts_per_tok for layer in smile_layers(model).values()} == {m}
    return model


def voted(model: nn.Module, prompt: list[int]) -> tuple[int, list[int]]:
    """The expert chosen for a prompt in transformers, with scope "prompt", and its greedy tokens."""
    ids = torch.tensor([prompt])
    with watch_routing(model) as counts:
        model(ids)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return int(list(counts.values())[-1].argmax()), answer[0, len(prompt) :].tolist()
