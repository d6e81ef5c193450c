"""SMILE checkpoints in vLLM against transformers: `make test-vllm`, in an environment of its own.

Not collected by default: vLLM pins other versions of its dependencies, and each case starts an engine (about 20 s).
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import build, fine_tuned, fuse, smile_layers
from tokenizers import Tokenizer, models, pre_tokenizers

from smile_kernels import SmileLinear
from smile_kernels.checkpoint import SmileConfig

# vLLM's CPU attention wants heads of 32; two ranks want an even number of key-value heads.
tiny_models.GROUPED.update(hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks on a machine with one NUMA node
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
TOKENS = 12
PROMPTS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()


def make(architecture: str, **options):
    base = build(architecture)
    return fuse(base, [fine_tuned(base, seed) for seed in (1, 2, 3)], **options)


@torch.no_grad()
def expected(model) -> list[list[int]]:
    """Greedy tokens by transformers, end-of-text tokens being like any other."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def in_vllm(folder, lora: str | None = None, **options) -> list[list[int]]:
    """Greedy tokens by vLLM, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_in_vllm, str(folder), lora, options).result()


def _in_vllm(folder: str, lora: str | None, options: dict) -> list[list[int]]:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, **options}
    engine = LLM(folder, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    request = LoRARequest("adapter", 1, lora) if lora else None
    outputs = engine.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, lora_request=request)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tensor_parallel_size": 2}),
        ("LlamaForCausalLM", {"enforce_eager": False}),
        ("LlamaForCausalLM", {"model_impl": "transformers"}),
        ("MistralForCausalLM", {}),
        ("MistralForCausalLM", {"tensor_parallel_size": 2}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen2ForCausalLM", {"tensor_parallel_size": 2}),
        ("Phi3ForCausalLM", {}),
        ("Phi3ForCausalLM", {"tensor_parallel_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "one",
)
def test_the_same_tokens(architecture, options, tmp_path):
    model = make(architecture, num_experts_per_tok=2 if "Mistral" in architecture else 1)
    model.save_pretrained(tmp_path)
    want = expected(model)
    assert want != expected(build(architecture))
    assert in_vllm(tmp_path, **options) == want


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_parts_that_differ(tensor_parallel_size, tmp_path):
    """In one merged layer: a dense part, a part of lower rank, a router of its own."""
    model = make("Qwen2ForCausalLM")
    base = build("Qwen2ForCausalLM")
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if i == 0:
            attention.v_proj = base.model.layers[0].self_attn.v_proj
        factors = {name: p for name, p in attention.k_proj.named_parameters() if name not in ("weight", "bias")}
        factors |= {"u": factors["u"][..., :2], "s": factors["s"][:, :2], "vh": factors["vh"][:, :3]}
        attention.k_proj = SmileLinear.from_factors(
            attention.k_proj.weight, attention.k_proj.bias, factors, rank_of_router=3
        )
        factors = {name: p for name, p in attention.q_proj.named_parameters() if name not in ("weight", "bias")}
        attention.q_proj = SmileLinear.from_factors(
            attention.q_proj.weight,
            attention.q_proj.bias,
            {**factors, "router": factors["vh"].flip(0)[:, :1]},
            rank_of_router=1,
        )
    model.config.quantization_config = SmileConfig.from_layers(smile_layers(model)).to_dict()
    model.save_pretrained(tmp_path)
    assert in_vllm(tmp_path, tensor_parallel_size=tensor_parallel_size) == expected(model)


@pytest.mark.parametrize("lost", ["q_proj.u", "k_proj.vh", "v_proj.s", "v_proj.expert_bias", "o_proj.weight"])
def test_missing_tensors_are_an_error(lost, tmp_path):
    make("Qwen2ForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.self_attn.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layer, name = lost.split(".")
    merged = layer if layer == "o_proj" else "qkv_proj"
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.self_attn\.{merged}: {name} of part . is missing"):
        in_vllm(tmp_path)


def test_lora_beside_smile(tmp_path):
    model = make("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, layer in enumerate(model.model.layers):
        for name in ("q_proj", "o_proj"):
            a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((8, 128), (128, 8)))
            key = f"base_model.model.model.layers.{i}.self_attn.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            getattr(layer.self_attn, name).weight.data += 2 * b @ a
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    got = in_vllm(tmp_path / "model", str(tmp_path / "lora"), enable_lora=True, max_lora_rank=8)
    assert got == expected(model)


def test_openai_server(tmp_path):
    model = make("MistralForCausalLM")
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT)
    try:
        body = {"model": str(tmp_path), "prompt": PROMPTS, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                answer = json.load(urllib.request.urlopen(request))
                break
            except urllib.error.URLError:
                time.sleep(1)
    finally:
        server.terminate()
        server.wait()
        log.close()
    got = [choice["text"].split() for choice in answer["choices"]]
    assert got == [[f"t{token}" for token in tokens] for tokens in expected(model)]
