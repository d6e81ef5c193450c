"""Conversion of layers and checkpoints of fusion_bench (tanganke/fusion_bench), the published implementation.

fusion_bench has two modules with two key layouts; N experts, k their rank, g the router's:

    linear_from_hf_config.SmileLinear      linear_from_module.SmileMoELinear
    gate.weight [N*g, D]                   gate.weights [N*g, D]
    shared_linear.{weight, bias}           pretrained_model.{weight, bias}
    experts.{i}.u [O, k], experts.{i}.svh [k, D], experts.{i}.bias [O]; dense experts: experts.{i}.weight [O, D]

fusion_bench is not imported: its modules are recognised by class name, its checkpoints by their keys.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..errors import SmileError
from ..functional import check_tensor
from ..nn import SmileLinear, all_or_nothing, replace_modules
from ..schema import check_arguments
from ..versions import warn_if_newer

__all__ = ["convert_state_dict", "from_fusion_bench", "holds_fusion_bench_layers"]

_MODULES = {"SmileLinear": "num_experts_per_tok", "SmileMoELinear": "top_k"}
_GATE = re.compile(r"(?:(?P<layer>.+)\.)?gate\.weights?")
_SHARED = re.compile(r"(?:(?P<layer>.+)\.)?(?:shared_linear|pretrained_model)\.weight")


@check_arguments
def from_fusion_bench(model: nn.Module) -> nn.Module:
    """Replace every SMILE layer of fusion_bench by a `SmileLinear` with the same outputs, in place.

    The factors are kept: u as stored, `svh` split into unit rows and norms, the gate as the first rows of `vh` if they
    are equal, else as `router`. Dense experts (no rank) become their exact full-rank SVD. Routing is computed in
    float32, so tokens with equal scores in the model's dtype may be routed differently.

    Args:
        model: any module with such layers, or one such layer.

    Returns:
        The same model; or the new layer if `model` is itself such a layer.

    Raises:
        ValueError: no such layer, or one with a missing tensor. Nothing is changed then.
    """
    warn_if_newer("fusion-bench")
    layers = {name: module for name, module in model.named_modules() if _is_smile(module)}
    if not layers:
        raise SmileError(f"model: {type(model).__name__} has no SMILE layer of fusion_bench; expected at least one")
    with all_or_nothing(model):
        converted = {}
        for name, module in layers.items():
            m = getattr(module, _MODULES[type(module).__name__])
            converted[name] = _convert_layer(module.state_dict(), num_experts_per_tok=m).train(module.training)
        replace_modules(model, ((module, converted[name]) for name, module in layers.items()))
    return converted.get("", model)


@check_arguments
def convert_state_dict(
    state_dict: Mapping[str, Tensor], *, num_experts_per_tok: int = 1
) -> tuple[dict[str, Tensor], SmileConfig]:
    """Convert a state dict of fusion_bench, in either layout, to our names, with the config of its layers.

    Args:
        state_dict: name -> tensor; tensors of other layers are passed through.
        num_experts_per_tok: m, which fusion_bench stores in the model's config, not in the state dict.

    Raises:
        ValueError: no SMILE layer of fusion_bench among the keys, or one with a missing tensor.
    """
    if odd := next((key for key in state_dict if not isinstance(key, str)), None):
        raise SmileError(f"state_dict: has {odd!r}; expected tensors by name")
    names = _layer_names(state_dict)
    if not names:
        raise SmileError("state_dict: contains no SMILE layer of fusion_bench; expected keys like <layer>.gate.weight")
    layers, converted = {}, dict(state_dict)
    for name in names:
        prefix = f"{name}." if name else ""
        keys = [key for key in converted if key.startswith(prefix)]
        tensors = {key.removeprefix(prefix): converted.pop(key) for key in keys}
        layers[name] = _convert_layer(tensors, num_experts_per_tok=num_experts_per_tok)
        converted |= {prefix + key: tensor for key, tensor in layers[name].state_dict().items()}
    return converted, SmileConfig.from_layers(layers)


def holds_fusion_bench_layers(names: Iterable[str]) -> bool:
    """Whether the tensor names are those of a fusion_bench checkpoint."""
    return bool(_layer_names(names))


def _is_smile(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fusion_bench.") and type(module).__name__ in _MODULES


def _layer_names(names: Iterable[str]) -> list[str]:
    """Names of the layers that have a gate and a shared linear layer."""
    shared = {match["layer"] for name in names if (match := _SHARED.fullmatch(name))}
    return [match["layer"] or "" for name in names if (match := _GATE.fullmatch(name)) and match["layer"] in shared]


@torch.no_grad()
def _convert_layer(tensors: Mapping[str, Tensor], *, num_experts_per_tok: int) -> SmileLinear:
    """A layer from its tensors, by fusion_bench's names relative to the layer."""

    def get(*names: str, shape: tuple[int | None, ...]) -> Tensor:
        for name in names:
            if name in tensors:
                return fit(name, shape)
        raise SmileError(f"state_dict: {' or '.join(names)} is missing; a SMILE layer of fusion_bench has it")

    def fit(name: str, shape: tuple[int | None, ...]) -> Tensor:
        tensor = tensors[name]
        check_tensor(f"state_dict[{name!r}]", tensor)
        if tensor.is_meta:
            raise SmileError(f"state_dict: {name} is on the meta device; expected its data")
        sizes = [own if want is None else want for want, own in zip(shape, tensor.shape)]
        if not tensor.is_floating_point() or len(shape) != tensor.dim() or sizes != list(tensor.shape):
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise SmileError(f"state_dict: {name} is {found}; expected floating-point numbers, [{wanted}]")
        return tensor

    weight = get("shared_linear.weight", "pretrained_model.weight", shape=(None, None))
    o, d = weight.shape
    biases = [name for name in ("shared_linear.bias", "pretrained_model.bias") if name in tensors]
    bias = fit(biases[0], (o,)) if biases else None
    n = len({key.split(".")[1] for key in tensors if key.startswith("experts.")})
    if n == 0:
        raise SmileError("state_dict: experts.0.u is missing; a SMILE layer of fusion_bench has it")
    gate = get("gate.weight", "gate.weights", shape=(None, d))
    if not len(gate) or len(gate) % n:
        raise SmileError(f"state_dict: the gate has {len(gate)} rows; expected as many for each of {n} experts")
    gate = gate.view(n, gate.shape[0] // n, d)

    def expert(i: int) -> tuple[Tensor, Tensor, Tensor]:
        if f"experts.{i}.u" not in tensors and f"experts.{i}.weight" in tensors:
            return _factors(fit(f"experts.{i}.weight", (o, d)), None, gate[i])
        svh = get(f"experts.{i}.svh", f"experts.{i}.weight", shape=(None, d))
        return _factors(svh, get(f"experts.{i}.u", shape=(o, len(svh))), gate[i])

    experts = [expert(i) for i in range(n)]
    if len(ranks := {len(s) for _, s, _ in experts}) > 1:
        raise SmileError(f"state_dict: the experts of a layer have ranks {sorted(ranks)}; expected one rank")
    u, s, vh = (torch.stack(factor) for factor in zip(*experts))
    # Tied if each gate row has the expert's direction; rows of a float32 SVD have norm 1 only to about 10 eps.
    rows, eps = min(vh.shape[1], gate.shape[1]), torch.finfo(weight.dtype).eps
    ours, gates, used = vh[:, :rows].double(), gate[:, :rows].double(), s[:, :rows] > 0
    length = (ours * gates).sum(-1) / gates.square().sum(-1).clamp_min(eps)
    apart = (ours - length[..., None] * gates).norm(dim=-1)
    tied = bool(((apart <= 2 * eps) & ((length - 1).abs() <= 32 * eps))[used].all())
    if tied:
        s[:, :rows] *= length.where(used, torch.zeros_like(length))
        vh = torch.cat([gate, vh[:, rows:]], dim=1)
    own = [fit(name, (o,)) if (name := f"experts.{i}.bias") in tensors else None for i in range(n)]
    if all(b is None for b in own):
        expert_bias = None
    else:
        expert_bias = torch.stack([torch.zeros_like(weight[:, 0]) if b is None else b for b in own])
    factors = {"vh": vh, "s": s, "u": u, "expert_bias": expert_bias, "router": None if tied else gate}
    return SmileLinear.from_factors(
        weight, bias, factors, rank_of_router=gate.shape[1], num_experts_per_tok=num_experts_per_tok
    )


def _factors(matrix: Tensor, u: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [O, r], s [r], vh [r, D] of one expert: from svh [r, D] and u, or from the dense difference [O, D]."""
    dtype = matrix.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = matrix.double()
    if u is None:
        left, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        # The gate's rows are right singular vectors of the same matrix, each up to its sign.
        rows = min(len(s), len(gate))
        sign = torch.ones_like(s)
        sign[:rows] = torch.where((vh[:rows] * gate[:rows]).sum(-1) < 0, -1.0, 1.0)
        return (left * sign).to(dtype), s.to(accumulate), (vh * sign[:, None]).to(dtype)
    s = matrix.norm(dim=-1)
    vh = matrix / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return u, s.to(accumulate), vh.to(dtype)
