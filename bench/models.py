"""Whole models with SMILE layers against the dense model, fusion_bench's modules and N separate models."""

import contextlib
import copy
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from smile_kernels import SmileLinear
from smile_kernels.benchmark.measure import Record, interleave, peak_memory
from smile_kernels.benchmark.peers import PEERS, CannotRunError, why_not
from smile_kernels.benchmark.problems import Setting
from smile_kernels.ops import library
from smile_kernels.testing import Problem

# Largest allowed difference of a variant to the reference, relative to its largest output: rounding through all layers
# of the model. In bfloat16 it allows for rounding in dense layers and for one token in a hundred routed differently.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Workload:
    """A model and its requests: `batch` requests for each of the N tasks, in one batch."""

    name: str
    config: transformers.PretrainedConfig
    setting: Setting
    dtype: torch.dtype
    batch: int
    prompt: int = 0
    decode: int = 0


def workloads(device: str) -> list[Workload]:
    """Mistral-7B and CLIP ViT-L/14 on a GPU; the same architectures scaled down on a CPU."""
    if device == "cuda":
        vision = transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        )
        return [
            Workload(
                "mistral-7b",
                transformers.MistralConfig(sliding_window=None),
                Setting(3, 64, 8),
                torch.bfloat16,
                2,
                512,
                32,
            ),
            Workload("clip-vit-l14", vision, Setting(8, 32, 16), torch.bfloat16, 4),
        ]
    text = transformers.MistralConfig(
        vocab_size=2048,
        hidden_size=768,
        intermediate_size=2688,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=3,
        sliding_window=None,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, patch_size=32
    )
    return [
        Workload("mistral, 6 layers of 768", text, Setting(3, 64, 8), torch.float32, 1, 64, 8),
        Workload("clip, 6 layers of 384", vision, Setting(8, 32, 16), torch.float32, 1),
    ]


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures it."""
    return {w.name: lambda w=w: measure_model(w, device) for w in workloads(device)}


@torch.no_grad()
def measure_model(workload: Workload, device: str, seconds: float = 6.0) -> Record:
    """Prefill and decode time of every variant, interleaved, with the memory of its parameters and of a forward.

    The dense model answers every request with the same weights; it is the lower bound of the time, and does not solve N
    tasks. The N separate models each answer their own requests. A variant whose output differs from that of the torch
    backend by more than TOLERANCE is refused.
    """
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if workload.decode else transformers.AutoModel
    with torch.device(device):
        dense = auto.from_config(workload.config, dtype=workload.dtype).eval()
    smile = _with_layers(dense, lambda linear: _smile_layer(linear, workload.setting))
    n = workload.setting.num_local_experts
    inputs = _inputs(workload, n * workload.batch, device)
    variants: dict[str, list[nn.Module] | str] = {"dense": [dense]}
    for backend in library.backends(device):
        reason = why_not(backend, device)
        variants[f"smile:{backend}"] = f"cannot run: {reason}" if reason else [smile]
    try:
        variants["fusion_bench"] = [_with_layers(smile, _fusion_bench_layer, SmileLinear)]
    except CannotRunError as error:
        variants["fusion_bench"] = f"cannot run: {error}"
    variants["separate models"] = [dense, *(copy.deepcopy(dense) for _ in range(n - 1))]

    record: Record = {
        "model": workload.name,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "setting": str(workload.setting),
        "requests": n * workload.batch,
        "prompt": workload.prompt,
        "decoded": workload.decode,
        "variants": {},
    }
    with _backend("torch"):
        want = _prefill(smile, inputs)[0]
    prefill, decode = {}, {}
    for name, models in variants.items():
        if isinstance(models, str):
            record["variants"][name] = {"cannot_run": models.removeprefix("cannot run: ")}
            continue
        backend = name.removeprefix("smile:") if name.startswith("smile:") else None
        with _backend(backend):
            if models[0] is not dense:
                error = ((_prefill(models[0], inputs)[0] - want).abs().max() / want.abs().max()).item()
                if not error <= TOLERANCE[workload.dtype]:
                    record["variants"][name] = {"refused": f"off by {error:.2g} of the largest output"}
                    continue
            prefill[name] = _in_backend(backend, _prefill_all(models, inputs))
            if workload.decode:
                decode[name] = _in_backend(backend, _decode_all(models, inputs, workload.decode))
            parameters = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
            record["variants"][name] = {"parameters": parameters, "memory": peak_memory(prefill[name], device)}
    for phase, calls in (("prefill", prefill), ("decode", decode)):
        for name, samples in (interleave(calls, device, seconds) if calls else {}).items():
            record["variants"][name][phase] = samples
    return record


def tokens_per_second(record: Record, variant: dict[str, Any], phase: str) -> float:
    """Median over rounds of the tokens (images, if there is no prompt) that one variant processes per second."""
    amount = record["requests"] * (record["decoded"] if phase == "decode" else max(record["prompt"], 1))
    return amount / statistics.median(variant[phase]["wall_us"]) * 1e6


def _inputs(workload: Workload, requests: int, device: str) -> dict[str, Tensor]:
    if workload.decode:
        ids = torch.randint(workload.config.vocab_size, (requests, workload.prompt), device=device)
        return {"input_ids": ids}
    side = workload.config.image_size
    return {"pixel_values": torch.randn(requests, 3, side, side, device=device, dtype=workload.dtype)}


def _prefill(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """(output, cache): logits of the last position, or the image embedding."""
    if "input_ids" not in inputs:
        return model(**inputs).pooler_output, None
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out.logits, out.past_key_values


def _split(models: list[nn.Module], inputs: dict[str, Tensor]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Each model with its share of the requests."""
    parts = [dict(zip(inputs, part)) for part in zip(*(t.chunk(len(models)) for t in inputs.values()))]
    return list(zip(models, parts))


def _prefill_all(models: list[nn.Module], inputs: dict[str, Tensor]) -> Callable[[], None]:
    shares = _split(models, inputs)

    def call() -> None:
        for model, share in shares:
            _prefill(model, share)

    return call


def _decode_all(models: list[nn.Module], inputs: dict[str, Tensor], steps: int) -> Callable[[], None]:
    """Greedy decoding after a prefill that is not timed; the cache is cropped to the prompt after every call."""
    shares = [(model, *_prefill(model, share)) for model, share in _split(models, inputs)]

    def call() -> None:
        for model, logits, cache in shares:
            for _ in range(steps):
                token = logits[:, -1:].argmax(-1)
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            cache.crop(-steps)

    return call


@contextlib.contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Run a model's SMILE layers on one backend."""
    before = os.environ.pop("SMILE_KERNELS_BACKEND", None)
    if name is not None:
        os.environ["SMILE_KERNELS_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("SMILE_KERNELS_BACKEND", None)
        if before is not None:
            os.environ["SMILE_KERNELS_BACKEND"] = before


def _in_backend(backend: str | None, call: Callable[[], None]) -> Callable[[], None]:
    def in_backend() -> None:
        with torch.no_grad(), _backend(backend):
            call()

    return in_backend


def _with_layers(model: nn.Module, convert: Callable[[nn.Module], nn.Module], kind: type = nn.Linear) -> nn.Module:
    """A copy of the model that shares its tensors, with every layer of a kind converted, except for the output head."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    converted = copy.deepcopy(model, memo=shared)
    for name, layer in model.named_modules():
        if isinstance(layer, kind) and name != "lm_head":
            converted.set_submodule(name, convert(layer))
    return converted


def _smile_layer(linear: nn.Linear, setting: Setting) -> SmileLinear:
    """Random experts for a linear layer, which keeps its tensors."""
    layer = SmileLinear(
        linear.in_features,
        linear.out_features,
        **setting.__dict__,
        bias=linear.bias is not None,
        expert_bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer


def _fusion_bench_layer(layer: SmileLinear) -> nn.Module:
    tensors = {name: getattr(layer, name) for name in ("weight", "bias", "vh", "s", "u", "expert_bias", "router")}
    problem = Problem(
        x=layer.weight[:0],
        **tensors,
        num_experts_per_tok=layer.num_experts_per_tok,
        rank_of_router=layer.rank_of_router,
    )
    detached = {name: t.detach() for name, t in problem.tensors().items()}
    module, _ = PEERS["fusion_bench"].build(replace(problem, **detached), torch.empty(0), torch.empty(0))
    return module
