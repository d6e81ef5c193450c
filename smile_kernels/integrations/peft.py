"""PEFT's LoRA adapters, read from disk as experts; PEFT itself is not needed.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors` with, for each adapted module,

    base_model.model.<module>.lora_A.weight [q, D]      base_model.model.<module>.lora_B.weight [O, q]

and stands for W + scale * B A with scale = alpha / q, or alpha / sqrt(q) where `use_rslora` is set.
"""

import fnmatch
import math
import re
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from ..storage import read_json, read_pickled, read_safetensors

__all__ = ["LowRankDelta", "ModuleDelta", "adapter_deltas", "is_adapter"]

_CONFIG = "adapter_config.json"

# Initialisations that change the base weights: the adapter then stands beside a base that is not the one given here.
_CHANGE_THE_BASE = ("pissa*", "olora", "corda", "loftq", "lora_ga")

# Variants whose adapted layer is not W + scale * B A.
_NOT_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class LowRankDelta:
    """The change scale * b @ a of a weight: b [O, q], a [q, D]."""

    b: Tensor
    a: Tensor
    scale: float


@dataclass(frozen=True)
class ModuleDelta:
    """What an adapter changes in one linear layer.

    Attributes:
        weight: the change of the weight [O, D], as factors or dense; None for no change. A dense change is oriented as
            the base's own tensor.
        bias: the change of the bias [O]; None for no change. The base may have no bias.
    """

    weight: LowRankDelta | Tensor | None = None
    bias: Tensor | None = None


def is_adapter(directory: str | Path) -> bool:
    """Whether `directory` holds a PEFT adapter."""
    return (Path(directory) / _CONFIG).is_file()


@torch.no_grad()
def adapter_deltas(directory: str | Path, base: Mapping[str, Tensor]) -> dict[str, ModuleDelta]:
    """What a LoRA adapter changes in each linear layer of its base.

    Rank and alpha patterns, rsLoRA, biases, transformers' Conv1D and fully saved linear layers (`modules_to_save`) are
    exact. DoRA rescales whole rows, which is not low rank: its change comes back dense, with a warning. What the
    adapter changes in modules without a matrix (norms) or by embedding factors is no expert: a warning lists it.

    Args:
        directory: the adapter's directory.
        base: the base model's tensors by name, `<module>.weight` and `<module>.bias`. Only the tensors that a change
            is taken against are read: those of DoRA, biases and fully saved layers.

    Returns:
        Module name -> its change, for the modules the adapter changes.

    Raises:
        FileNotFoundError: `directory` holds no adapter.
        ValueError: another kind of adapter than LoRA, one that changed its base, or one that does not fit `base`.
    """
    directory = Path(directory)
    config = _config(directory)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(directory).items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.(lora_.+|[^.]+)", key)
        if match is None:
            raise ValueError(
                f"{directory}: holds {key!r}; expected names such as base_model.model.<layer>.lora_A.weight"
            )
        module, part = match.groups()
        if f"{module}.weight" not in base:
            raise ValueError(f"{directory}: changes {module!r}, which the base lacks; expected an adapter of this base")
        modules.setdefault(module, {})[part] = tensor

    deltas, dora, other = {}, [], []
    for module, tensors in modules.items():
        weight: LowRankDelta | Tensor | None = None
        bias: Tensor | None = None
        if "lora_A.weight" in tensors and tensors["lora_A.weight"].dim() == 2:
            weight, bias = low_rank, _ = _low_rank(module, tensors, config)
            magnitude = tensors.get("lora_magnitude_vector", tensors.get("lora_magnitude_vector.weight"))
            if magnitude is not None:
                weight = _dora(low_rank, magnitude, base[f"{module}.weight"], config.get("fan_in_fan_out", False))
                dora.append(module)
        elif "weight" in tensors and tensors["weight"].dim() == 2 and "lora_embedding_A" not in tensors:
            weight = _difference(module, "weight", tensors["weight"], base)
        elif set(tensors) != {"bias"} or base[f"{module}.weight"].dim() != 2:
            other.append(module)
            continue
        if "bias" in tensors:
            change = _difference(module, "bias", tensors["bias"], base)
            bias = change if bias is None else bias + change
        deltas[module] = ModuleDelta(weight, bias)
    if dora:
        warnings.warn(
            f"{directory}: DoRA rescales rows, so the changes of {len(dora)} layers are not of low rank; they are "
            "truncated as those of a full fine-tune are",
            stacklevel=2,
        )
    if other:
        warnings.warn(f"{directory}: changes that cannot be experts are left out: {', '.join(other)}", stacklevel=2)
    return deltas


def _config(directory: Path) -> dict:
    if not is_adapter(directory):
        raise FileNotFoundError(f"directory: {directory} has no {_CONFIG}; expected a PEFT adapter")
    config = read_json(directory / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type: {directory} is {config.get('peft_type')}; expected LORA (DoRA and rsLoRA included)"
        )
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and any(fnmatch.fnmatch(initial.lower(), name) for name in _CHANGE_THE_BASE):
        raise ValueError(
            f"init_lora_weights: {directory} is {initial!r}, which changes the base weights; expected a plain LoRA "
            "(PEFT converts: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key in _NOT_LORA:
        if config.get(key):
            raise ValueError(f"{key}: is set in {directory}; expected a plain LoRA adapter")
    _check_values(directory / _CONFIG, config)
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def _check_values(file: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the values that a change is computed from have their types."""
    if not _is_number(config.get("lora_alpha")):
        raise ValueError(f"{file}: lora_alpha is {config.get('lora_alpha')!r}; expected a positive number")
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping) or not all(_is_number(value) for value in patterns.values()):
            raise ValueError(f"{file}: {name} is {reprlib.repr(patterns)}; expected positive numbers by pattern")
        for pattern in patterns:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{file}: {name}: {pattern!r} is not a regular expression ({error})") from None
    for name in ("use_rslora", "fan_in_fan_out", "use_dora"):
        if not isinstance(config.get(name, False), bool):
            raise ValueError(f"{file}: {name} is {config[name]!r}; expected true or false")


def _matches(pattern: str, module: str) -> bool:
    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", module, timeout=1.0))
    except TimeoutError:
        raise ValueError(f"alpha_pattern: {pattern!r} takes more than a second on {module!r}; expected less") from None


def _tensors(directory: Path) -> dict[str, Tensor]:
    for name, read in (("adapter_model.safetensors", read_safetensors), ("adapter_model.bin", read_pickled)):
        if (directory / name).exists():
            return {tensor.name: tensor.load() for tensor in read(directory / name)}
    raise FileNotFoundError(f"directory: {directory} has no adapter_model.safetensors and no adapter_model.bin")


def _low_rank(module: str, tensors: dict[str, Tensor], config: dict) -> tuple[LowRankDelta, Tensor | None]:
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"{module}: lora_B {list(b.shape)} does not fit lora_A {list(a.shape)}")
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if _matches(key, module)), config["lora_alpha"])
    q = a.shape[0]
    scale = alpha / (math.sqrt(q) if config.get("use_rslora") else q)
    bias = tensors.get("lora_B.bias")
    return LowRankDelta(b, a, scale), None if bias is None else bias.float() * scale


def _dora(delta: LowRankDelta, magnitude: Tensor, weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """W' - W with W' = magnitude * V / ||V|| row by row, V = W + scale * B A."""
    w = (weight.T if fan_in_fan_out else weight).float()
    v = w + delta.scale * (delta.b.float() @ delta.a.float())
    change = magnitude.float().view(-1, 1) * v / torch.linalg.vector_norm(v, dim=1, keepdim=True) - w
    return change.T.contiguous() if fan_in_fan_out else change


def _difference(module: str, name: str, tensor: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    """The change of a tensor that the adapter holds whole; a tensor the base lacks counts as 0 there."""
    before = base.get(f"{module}.{name}")
    if before is None:
        return tensor.float()
    if tensor.shape != before.shape:
        raise ValueError(f"{module}.{name}: has shape {list(tensor.shape)}; expected the base's, {list(before.shape)}")
    return tensor.float() - before.float()
