"""SMILE checkpoints in vLLM compared with transformers: `make test-vllm`, in a separate environment.

Not collected by default: vLLM pins other versions of its dependencies, and each engine takes about 20 s to start. So
there is one engine for each architecture and number of ranks, and each of them tests several properties.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smile_kernels import RoutingPolicy, routing_override
from smile_kernels.integrations.vllm import reports

from .vllm_served import (
    CHUNKS,
    ENVIRONMENT,
    EXAMPLE,
    LONG,
    PROMPTS,
    SMALL,
    TOKENS,
    VOTING,
    greedy,
    in_vllm,
    served,
    voted,
    with_routing,
)


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
def test_the_same_tokens(architecture, options):
    case = served(architecture)
    assert in_vllm(case.folder, **options) == [case.tokens]


@pytest.mark.engine
def test_conv1d_layers_saved_from_memory(tmp_path):
    """transformers stores them as in memory, unlike the base's checkpoint; some of them are square."""
    case = served("GPT2LMHeadModel")
    case.model.save_pretrained(tmp_path)
    stored, base = (load_file(folder / "model.safetensors") for folder in (tmp_path, case.folder))
    square = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(stored[square], base[square].T)
    assert not torch.equal(stored[square], base[square])
    assert in_vllm(tmp_path) == [case.tokens]


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
def test_routing_policies_with_sums(architecture, policy, options, tmp_path):
    case = served(architecture)
    model = with_routing(case.folder, tmp_path, policy)
    want = [greedy(model, prompt) for prompt in LONG]
    assert want != [greedy(case.model, prompt) for prompt in LONG]
    assert in_vllm(tmp_path, prompts=LONG, **options) == [want]


@pytest.mark.engine
@pytest.mark.parametrize(
    "policy",
    [RoutingPolicy(), RoutingPolicy("causal", accumulate=True), RoutingPolicy("prompt", lock_after=1)],
    ids=["token", "causal", "prompt"],
)
def test_the_same_tokens_with_and_without_a_lora_adapter(policy, tmp_path):
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
def test_the_example_compiles_the_model(policy, tmp_path):
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
def test_openai_server(tmp_path):
    case = served("MistralForCausalLM")
    answer, metrics = over_http(case.folder, [{"prompt": PROMPTS}], tmp_path / "log")
    assert texts(answer) == case.tokens
    assert answer["kv_transfer_params"] is None
    assert "smile_expert_tokens" not in metrics


@pytest.mark.engine
def test_openai_server_whose_prompts_vote(tmp_path):
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
def test_missing_tensors_are_an_error(lost, tmp_path):
    folder = served("Qwen2ForCausalLM").folder
    names = [f"model.layers.1.self_attn.{name}" for name in lost]
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k not in names}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint: missing, or with NaN in them: (.*)") as error:
        in_vllm(tmp_path)
    assert sorted(re.search("in them: (.*)", str(error.value))[1].split(", ")) == sorted(names)


@pytest.mark.engine
def test_engines_that_cannot_carry_routing_are_refused(tmp_path):
    with_routing(served("LlamaForCausalLM").folder, tmp_path, RoutingPolicy("causal"))
    ports = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(NotImplementedError, match=r"kv_transfer_config: does not go with .*scope='causal'"):
        in_vllm(tmp_path, kv_transfer_config=ports)
    with pytest.raises(ValueError, match="smile_report_experts: is True, and layers choose an expert for each token"):
        in_vllm(served("LlamaForCausalLM").folder, additional_config={reports.FLAG: True})
