"""From fine-tuned weights to SMILE layers: this package and fusion_bench's upscale_to_smile_linear."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn

import smile_kernels as sk
from smile_kernels.benchmark.measure import Record, interleave
from smile_kernels.benchmark.problems import Setting

SETTING = Setting(2, 32, 16)


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures it."""
    layers = [(768, 768), (768, 3072)] if device == "cpu" else [(768, 768), (4096, 4096), (4096, 14336)]
    plans = {f"layer {d} to {o}": lambda d=d, o=o: measure_layer(d, o, device) for d, o in layers}
    return plans | {"model": lambda: measure_model(device)}


@torch.no_grad()
def measure_layer(in_features: int, out_features: int, device: str, seconds: float = 3.0) -> Record:
    """One layer and its experts. Refused if its error is more than 0.1% above that of fusion_bench's full SVD."""
    base = nn.Linear(in_features, out_features, device=device)
    finetuned = [_finetuned(base, seed) for seed in range(SETTING.num_local_experts)]
    calls = {
        "smile": lambda: _ours(base, finetuned),
        "fusion_bench": lambda: _fusion_bench(base, finetuned),
    }
    ours, theirs = (call() for call in calls.values())
    record: Record = {"device": device, "threads": torch.get_num_threads(), "setting": str(SETTING), "peers": {}}
    for i, layer in enumerate(finetuned):
        difference = layer.weight - base.weight
        error = (difference - (ours.u[i] * ours.s[i]) @ ours.vh[i, : SETTING.rank_of_expert]).norm()
        best = (difference - theirs.experts[i].u @ theirs.experts[i].svh).norm()
        if not error <= 1.001 * best + 1e-5 * difference.norm():
            record["peers"]["smile"] = {"refused": f"expert {i}: error {error:.4g}, fusion_bench's {best:.4g}"}
            del calls["smile"]
            break
    record["peers"] |= interleave(calls, device, seconds)
    return record


@torch.no_grad()
def measure_model(device: str) -> Record:
    """Every linear layer of a small CLIP vision model."""
    config = transformers.CLIPVisionConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )
    torch.manual_seed(0)
    base = transformers.CLIPVisionModel(config).to(device)
    experts = [copy.deepcopy(base) for _ in range(SETTING.num_local_experts)]
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    for seed, expert in enumerate(experts):
        for name in names:
            expert.set_submodule(name, _finetuned(base.get_submodule(name), seed))

    def theirs() -> None:
        for name in names:
            _fusion_bench(base.get_submodule(name), [expert.get_submodule(name) for expert in experts])

    ranks = {"rank_of_expert": SETTING.rank_of_expert, "rank_of_router": SETTING.rank_of_router}
    calls = {"smile": lambda: sk.upscale(base, experts, **ranks, progress=False), "fusion_bench": theirs}
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "setting": str(SETTING),
        "layers": len(names),
        "peers": interleave(calls, device, seconds=3),
    }


def _finetuned(base: nn.Linear, seed: int) -> nn.Linear:
    """The layer plus a full-rank difference whose singular values decay as a power of their index."""
    generator = torch.Generator().manual_seed(seed)
    o, d = base.weight.shape
    k = min(o, d)

    def directions(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=generator) / rows**0.5

    s = 0.1 * torch.arange(1, k + 1) ** -0.8
    layer = copy.deepcopy(base)
    layer.weight += ((directions(o) * s) @ directions(d).T).to(layer.weight)
    if layer.bias is not None:
        layer.bias += 0.01
    return layer


def _ours(base: nn.Linear, finetuned: list[nn.Linear]) -> sk.SmileLinear:
    return sk.SmileLinear.from_linears(
        base, finetuned, rank_of_expert=SETTING.rank_of_expert, rank_of_router=SETTING.rank_of_router
    )


def _fusion_bench(base: nn.Linear, finetuned: list[nn.Linear]) -> nn.Module:
    from fusion_bench.models.smile_moe.linear_from_hf_config import SmileLinear, upscale_to_smile_linear

    target = SmileLinear(
        SimpleNamespace(**SETTING.__dict__),
        base.in_features,
        base.out_features,
        bias=base.bias is not None,
        device=base.weight.device,
        dtype=base.weight.dtype,
    )
    return upscale_to_smile_linear(base, finetuned, target)
