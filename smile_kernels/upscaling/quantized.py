"""A base whose linear layers are stored quantised: its experts are adapters, and its tensors are copied unchanged.

The factors of a LoRA adapter do not depend on the base's weights. A layer's tensors there are represented by one weight
of the model's shape, of which only shape and dtype are used.
"""

import contextlib
import copy
import functools
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import read_config
from ..errors import SmileError, reason
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
}
# The same for formats of compressed-tensors, and the dtypes of its packed weights.
_NEEDED_PACKED = {
    "pack-quantized": ("weight|weight_shape",),
    "nvfp4-pack-quantized": ("weight|weight_global_scale",),
}
# Of compressed-tensors: the dtypes of weight_packed and of weight, by format.
_PACKED_DTYPES = {
    "pack-quantized": torch.int32,
    "nvfp4-pack-quantized": torch.uint8,
    "mxfp4-pack-quantized": torch.uint8,
}
_WEIGHT_DTYPES = {
    "int-quantized": (torch.int8,),
    "float-quantized": (torch.float8_e4m3fn,),
    "naive-quantized": (torch.int8, torch.float8_e4m3fn),
}
# Of torchao: scales, and the dtypes of quantised data by type.
_SCALES_OF_TORCHAO = ("_weight_scale", "_weight_scale_and_zero", "_weight_per_tensor_scale")
_QDATA_DTYPES = {
    "Float8Tensor": (torch.float8_e4m3fn, torch.float8_e5m2),
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Int4Tensor": (torch.int8, torch.uint8),
    "Int4PlainInt32Tensor": (torch.int32,),
    "Int4TilePackedTo4dTensor": (torch.int32,),
    "NVFP4Tensor": (torch.uint8, torch.float4_e2m1fn_x2),
}
# Settings with names of layers; a pattern begins with one of these prefixes.
_NAMES_OF_LAYERS = ("ignore", "ignored_layers", "modules_to_not_convert", "targets")
_PATTERNS = ("re:", "+:", "-:")


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
    _check_quantization_config(folder, quantization)
    method, dtype = quantization["quant_method"], _dtype(folder)
    if names.model is None:
        raise SmileError(
            f"base: {folder} is stored as {method!r}, and names no architecture that transformers supports; "
            "expected one, which determines its layers"
        )
    tensors = read_tensors(folder)
    prepared = _prepared(folder, quantization, names.model, {str(tensor.file) for tensor in tensors.values()})
    stored: dict[str, StoredTensor] = {}
    packed: dict[str, list[StoredTensor]] = {}
    for name, tensor in tensors.items():
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
    metadata = metadata_of(tensors.values()) if method == "torchao" else {}
    for weight, of_layer in packed.items():
        wanted = (*_NEEDED.get(method, ()), *_NEEDED_PACKED.get(_format(quantization), ()))
        of_weight = quantization
        if method == "torchao":
            of_weight = {**quantization, **_described(of_layer[0], weight, metadata)}
            wanted = tuple(f"_weight_{name}" for name in of_weight["_tensor_data_names"])
        _check_shapes(of_weight, tuple(stored[weight].shape), of_layer)
        parts = {tensor.name.rpartition(".")[2] for tensor in of_layer}
        for needed in wanted:
            if not parts.intersection(same := needed.split("|")):
                raise SmileError(
                    f"base: {folder} has no {' or '.join(same)} of {weight.removesuffix('.weight')!r}; expected every "
                    f"tensor of a layer that is stored as {method!r}"
                )
    if not packed:
        raise SmileError(f"base: {folder} says that it is stored as {method!r}, and has no such tensors; expected some")
    if prepared is not None:
        _check_as_prepared(folder, quantization, names, prepared, tensors, packed)
    return stored, packed


def _check_quantization_config(folder: Path, quantization: Mapping[str, Any]) -> None:
    """Raises ValueError for no layers, names of layers that are not a list, or a pattern that is not an expression."""
    where = f"{folder / 'config.json'}: quantization_config has"
    if quantization["quant_method"] == "compressed-tensors" and not quantization.get("config_groups"):
        groups = quantization.get("config_groups")
        raise SmileError(f"{where} config_groups {groups!r}; expected the layers that are stored so")
    for setting in _NAMES_OF_LAYERS:
        for given in _settings(quantization, setting):
            if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
                raise SmileError(f"{where} {setting} {given!r}; expected a list of names of layers")
    for pattern in _strings(quantization):
        try:
            re.compile(pattern.partition(":")[2] if pattern.startswith(_PATTERNS) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise SmileError(f"{where} {pattern!r}, not a regular expression ({error}); expected one") from None


def _prepared(
    folder: Path, quantization: Mapping[str, Any], model: nn.Module, files: Collection[str]
) -> nn.Module | None:
    """A copy of the model as transformers prepares it for the base's tensors; None where it does not load them here.

    Raises:
        ValueError: settings that transformers, or the library of the method where installed, does not load.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    from ..integrations.transformers import BASES

    try:
        config = AutoQuantizationConfig.from_dict(copy.deepcopy(dict(quantization)))
        if quantization["quant_method"] not in BASES:
            return None
        model = copy.deepcopy(model)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
            quantizer.validate_environment()
            quantizer.preprocess_model(model, checkpoint_files=sorted(files))
    except ImportError:  # a base for vLLM alone
        return None
    except Exception as error:  # of a library: an assertion, a bad pattern, ...
        raise SmileError(
            f"{folder / 'config.json'}: quantization_config is refused by transformers ({reason(error)}); expected one "
            "that the base loads with"
        ) from error
    return model


def _check_as_prepared(
    folder: Path,
    quantization: Mapping[str, Any],
    names: ModelNames,
    prepared: nn.Module,
    tensors: Mapping[str, StoredTensor],
    packed: Mapping[str, list[StoredTensor]],
) -> None:
    """Raises ValueError unless quantised layers and a quantised KV cache have the tensors that transformers expects."""
    from ..integrations.transformers import checkpoint_renaming

    renamed = checkpoint_renaming(prepared)
    present = {renamed(name)[0]: tensor for name, tensor in tensors.items()}
    quantised = {names.parameter(weight) for weight in packed}
    compressed = quantization.get("quantization_status") == "compressed"
    for name, expected in prepared.state_dict().items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if name in names.state or (weight in names.state and weight not in quantised):
            continue
        if name not in present and name.endswith("zero_point") and not compressed:  # made in any case, and 0 there
            continue
        setting = "config_groups" if weight in quantised else "kv_cache_scheme"
        because = f"by {setting} of the quantization_config in config.json"
        if name not in present:
            raise SmileError(f"base: {folder} has no tensor {name!r}; expected it, {because}")
        tensor = present[name]
        if tensor.shape != expected.shape and not math.prod(tensor.shape) == expected.numel() == 1:
            raise SmileError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}; expected "
                f"{list(expected.shape)}, {because}"
            )


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
    if part == "_weight_qdata":
        return _QDATA_DTYPES.get(quantization["_type"], ())
    if part == "weight_packed" and (dtype := _PACKED_DTYPES.get(_format(quantization))):
        return (dtype,)
    if part == "weight":
        return _WEIGHT_DTYPES.get(_format(quantization), ())
    if part in ("scales", "weight_scale", "weight_scale_inv", "weight_global_scale", *_SCALES_OF_TORCHAO):
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
        return _shapes_of_torchao(quantization, o, d)
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


def _shapes_of_torchao(described: Mapping[str, Any], o: int, d: int) -> dict[str, list[tuple[int, ...]]]:
    """The possible shapes of the tensors of a weight [O, D] of known types, as the metadata describes them."""
    kind, block = described["_type"], described["_data"].get("block_size")
    block = (1, block) if isinstance(block, int) else block
    if not _is_block(block):
        return {}
    n, k = -(-o // block[0]), -(-d // block[1])
    qdata: list[tuple[int, ...]]
    scale: list[tuple[int, ...]]
    if kind in ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor"):
        qdata, scale = [(o, d)], [(n, k), *([(), (1,)] if n == k == 1 else [])]
    elif kind in ("Int4Tensor", "Int4PlainInt32Tensor"):
        qdata, scale = [(o, d // (2 if kind == "Int4Tensor" else 8))], [(k, n)]
    elif kind == "Int4TilePackedTo4dTensor":  # padded to whole tiles, of 8 rows, or of 16 on AMD's GPUs
        whole, tiles = -(-d // 1024) * 1024, {8: -(-o // 8), 16: -(-o // 16)}
        qdata = [(count, whole // 128, 4 * rows, 4) for rows, count in tiles.items()]
        scale = [(whole // block[1], rows * count, 2) for rows, count in tiles.items()]
    elif kind == "NVFP4Tensor":
        swizzled = (-(-o // 128) * 32, -(-k // 4) * 16)
        qdata, scale = [(o, d // 2)], [swizzled if described["_data"].get("is_swizzled_scales") else (o, k)]
    else:
        return {}
    scales = dict.fromkeys(("_weight_scale", "_weight_zero_point", "_weight_scale_and_zero"), scale)
    return {"_weight_qdata": qdata, "_weight_per_tensor_scale": [()], **scales}


def _described(tensor: StoredTensor, weight: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """torchao's description of a weight in the metadata of its files; raises ValueError where it has none."""
    try:
        described = json.loads(metadata.get(weight, "null"))
    except ValueError:
        described = None
    wanted = (("_type", str), ("_data", dict), ("_tensor_data_names", list))
    if not isinstance(described, dict) or not all(isinstance(described.get(key), kind) for key, kind in wanted):
        raise SmileError(
            f"{tensor.file}: its metadata has {metadata.get(weight)!r} for {weight!r}; expected torchao's description "
            "of a quantised tensor"
        )
    return described


def _strings(config: Any) -> Iterator[str]:
    """The strings in a config, also its keys."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, (list, Mapping)):
        for one in (*config, *config.values()) if isinstance(config, Mapping) else config:
            yield from _strings(one)


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
