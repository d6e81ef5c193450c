"""A base whose linear layers are stored quantised: its experts are adapters, and its tensors are copied unchanged.

The factors of a LoRA adapter do not depend on the base's weights. A layer's tensors there are represented by one weight
of the model's shape, of which only shape and dtype are used.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import read_config
from ..errors import SmileError
from ..integrations.conversion import ModelNames
from ..integrations.peft import LowRankDelta
from ..storage import StoredTensor, read_metadata, read_tensors
from .sources import AdapterSource, ExpertSource, read_plain

__all__ = ["check_experts", "metadata_of", "open_base", "quantization_of"]

# Names of the tensors that each method stores instead of `<layer>.weight`; a `weight` has another dtype there.
METHODS = {
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"),
    ),
    "fp8": ("weight", "weight_scale", "weight_scale_inv", "input_scale"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "torchao": tuple(
        f"_weight_{name}"
        for name in ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale")
    ),
}
# Of these, what no layer works without; "|" separates names for the same.
_NEEDED = {
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight|weight_packed", "weight_scale"),
    "fp8": ("weight", "weight_scale|weight_scale_inv"),
    "gptq": ("qweight", "scales"),
    "torchao": ("_weight_qdata", "_weight_scale|_weight_scale_and_zero"),
}
# The same for formats of compressed-tensors, and the dtypes of its packed weights.
_NEEDED_PACKED = {
    "pack-quantized": ("weight|weight_shape",),
    "nvfp4-pack-quantized": ("weight|weight_global_scale",),
}
_PACKED_DTYPES = {
    "pack-quantized": torch.int32,
    "nvfp4-pack-quantized": torch.uint8,
    "mxfp4-pack-quantized": torch.uint8,
}


def quantization_of(folder: str | Path) -> dict[str, Any] | None:
    """The `quantization_config` of a base, where its experts may be adapters; None where its config has none.

    Raises:
        ValueError: another method.
    """
    config = read_config(folder).get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if not isinstance(method, str) or method not in METHODS:
        raise SmileError(
            f"base: {folder} is stored as {method!r}; expected a checkpoint of plain weights, or of "
            f"{', '.join(sorted(METHODS))} with LoRA adapters"
        )
    return dict(config)


def open_base(folder: Path, names: ModelNames) -> tuple[dict[str, StoredTensor], dict[str, list[StoredTensor]]]:
    """The base's tensors by name, and the tensors for which some of them stand: none where it is not quantised.

    Raises:
        ValueError: a base that is not known here, or whose tensors are not those of its model.
    """
    quantization = quantization_of(folder)
    if quantization is None:
        return read_plain("base", folder), {}
    _check_settings(folder, quantization)
    method, dtype = quantization["quant_method"], _dtype(folder)
    if names.model is None:
        raise SmileError(
            f"base: {folder} is stored as {method!r}, and names no architecture that transformers supports; "
            "expected one, which determines its layers"
        )
    stored: dict[str, StoredTensor] = {}
    packed: dict[str, list[StoredTensor]] = {}
    for name, tensor in read_tensors(folder).items():
        layer, _, part = name.rpartition(".")
        plain = part == "weight" and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        if plain or part not in METHODS[method]:
            stored[name] = tensor
            continue
        weight = f"{layer}.weight"
        parameter = names.parameter(weight)
        if parameter is None or parameter not in names.state:
            raise SmileError(
                f"{tensor.file}: tensor {name!r} is of no layer of the {type(names.model).__name__} that "
                "config.json describes; expected its layers"
            )
        shape = tuple(names.state[parameter].shape)
        packed.setdefault(weight, []).append(tensor)
        stored[weight] = StoredTensor(weight, dtype, shape, functools.partial(torch.zeros, shape, dtype=dtype), folder)
    for weight, tensors in packed.items():
        _check_shapes(quantization, tuple(stored[weight].shape), tensors)
        parts = {tensor.name.rpartition(".")[2] for tensor in tensors}
        for needed in (*_NEEDED[method], *_NEEDED_PACKED.get(_format(quantization), ())):
            if not parts.intersection(same := needed.split("|")):
                raise SmileError(
                    f"base: {folder} has no {' or '.join(same)} of {weight.removesuffix('.weight')!r}; expected every "
                    f"tensor of a layer that is stored as {method!r}"
                )
    if not packed:
        raise SmileError(f"base: {folder} says that it is stored as {method!r}, and has no such tensors; expected some")
    return stored, packed


def _check_settings(folder: Path, quantization: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that transformers, or the library of the method where installed, does not load."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    if quantization["quant_method"] == "compressed-tensors" and not quantization.get("config_groups"):
        raise SmileError(
            f"{folder / 'config.json'}: quantization_config has config_groups {quantization.get('config_groups')!r}; "
            "expected the layers that are stored so"
        )
    try:
        AutoQuantizationConfig.from_dict(copy.deepcopy(dict(quantization)))
    except ImportError:  # a base for vLLM alone
        return
    except Exception as error:  # of a library: an assertion, a bad pattern, ...
        said = " ".join(str(error).split())
        raise SmileError(
            f"{folder / 'config.json'}: quantization_config is refused by transformers ({said:.300}); expected one "
            "that the base loads with"
        ) from error


def _check_shapes(quantization: Mapping[str, Any], shape: tuple[int, ...], tensors: Iterable[StoredTensor]) -> None:
    """Raises ValueError unless the tensors of a layer, as far as they are known, are those of such a weight."""
    for tensor in tensors if len(shape) == 2 else ():
        part = tensor.name.rpartition(".")[2]
        allowed = _shapes(quantization, *shape).get(part)
        found, expected = "", ""
        if allowed and tuple(tensor.shape) not in allowed:
            found, expected = f"has shape {list(tensor.shape)}", " or ".join(str(list(one)) for one in allowed)
        elif part == "weight_shape" and (stored := tensor.load().tolist()) != list(shape):
            found, expected = f"is {stored}", str(list(shape))
        elif (dtypes := _dtypes(quantization, part)) and tensor.dtype not in dtypes:
            found, expected = f"is {tensor.dtype}", " or ".join(map(str, dtypes))
        if found:
            raise SmileError(
                f"{tensor.file}: tensor {tensor.name!r} {found}; expected {expected}, of a weight {list(shape)} that "
                f"is stored as {quantization['quant_method']!r}"
            )


def _format(quantization: Mapping[str, Any]) -> str:
    """The format of compressed-tensors in which all layers are stored; "" for several, or none."""
    formats = {one for one in _settings(quantization, "format") if isinstance(one, str)}
    return formats.pop() if len(formats) == 1 else ""


def _dtypes(quantization: Mapping[str, Any], part: str) -> tuple[torch.dtype, ...]:
    """The possible dtypes of a tensor that a method stores; none where they are not known."""
    if part in ("qweight", "qzeros"):
        return (torch.int32,)
    if part == "weight_packed" and (dtype := _PACKED_DTYPES.get(_format(quantization))):
        return (dtype,)
    if part in ("scales", "weight_scale", "weight_scale_inv", "weight_global_scale"):
        exponents = (torch.uint8, torch.float8_e8m0fnu)  # of microscaling formats
        return (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, *exponents)
    return ()


def _shapes(quantization: Mapping[str, Any], o: int, d: int) -> dict[str, list[tuple[int, ...]]]:
    """The possible shapes of the tensors that some methods store for a weight [O, D]."""
    method = quantization["quant_method"]
    if method in ("awq", "gptq"):
        bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
        layout = str(quantization.get("version" if method == "awq" else "checkpoint_format", "gemm")).lower()
        known = layout in ("gemm", "gptq", "gptq_v2") and not quantization.get("dynamic")  # bits for each layer
        if not known or bits not in (2, 3, 4, 8) or not isinstance(size, int) or size == 0:
            return {}
        groups = max(1, -(-d // size))
        qweight = (d, o * bits // 32) if method == "awq" else (d * bits // 32, o)
        return {"qweight": [qweight], "qzeros": [(groups, o * bits // 32)], "scales": [(groups, o)], "g_idx": [(d,)]}
    if method == "torchao":
        return {}
    blocks = [(1, size) for size in _settings(quantization, "group_size")]
    blocks += [(128, 128), *_settings(quantization, "weight_block_size"), *_settings(quantization, "block_structure")]
    scales: list[tuple[int, ...]] = [(), (1,), (o,), (o, 1)]
    scales += [(-(-o // block[0]), -(-d // block[1])) for block in blocks if _is_block(block)]
    packed: list[tuple[int, ...]] = []
    if _format(quantization) == "pack-quantized":
        counts = [bits for weights in _settings(quantization, "weights") for bits in _settings(weights, "num_bits")]
        packed = [(o, -(-d // (32 // bits))) for bits in counts if isinstance(bits, int) and 0 < bits <= 8]
    elif _format(quantization) in _PACKED_DTYPES:
        packed = [(o, d // 2)]
    scaled = {"weight_scale": scales, "weight_scale_inv": scales}
    return {"weight": [(o, d)], "weight_packed": packed, "weight_shape": [(2,)], **scaled}


def _settings(config: Any, name: str) -> Iterator[Any]:
    """The values of a setting in a config and in the objects inside it."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        yield from [value] if key == name else _settings(value, name)


def _is_block(block: Any) -> bool:
    return isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)


def metadata_of(quantised: Iterable[StoredTensor]) -> dict[str, str]:
    """The metadata of the files of quantised tensors, by which torchao builds its own."""
    files = {Path(tensor.file) for tensor in quantised}
    return {key: text for file in sorted(files) for key, text in read_metadata(file).items()}


def check_experts(source: ExpertSource, packed: Mapping[str, object]) -> None:
    """Raises ValueError unless an expert is an adapter of low-rank changes, as far as a quantised base is concerned."""
    if not isinstance(source, AdapterSource):
        raise SmileError(
            f"{source.where}: is a fine-tuned model, and the base is stored quantised; expected LoRA adapters, or the "
            "base in plain weights, to take differences from"
        )
    for name, delta in source.deltas.items():
        weight = delta.weight
        dora = isinstance(weight, LowRankDelta) and weight.magnitude is not None
        if f"{name}.weight" in packed and (dora or isinstance(weight, Tensor)):
            kind = "rescales rows of" if dora else "saves whole"
            raise SmileError(
                f"{source.where}: {kind} {name}, which the base stores quantised; expected changes of low rank, or the "
                "base in plain weights"
            )


def _dtype(folder: Path) -> torch.dtype:
    """The dtype in which the model of a checkpoint computes."""
    config = read_config(folder)
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SmileError(f"{folder / 'config.json'}: dtype is {name!r}; expected bfloat16, float16 or float32")
    return dtype
