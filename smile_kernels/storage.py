"""Checkpoint files: tensors read one at a time and checked, written one at a time and whole or not at all."""

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .publishing import new_file, write_text

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: what is known without reading it, and how to read it.

    Args:
        name, dtype, shape: as its file's header says.
        read: reads the data, a tensor of its own.
        file: where it lies, for messages.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    file: str | Path

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "StoredTensor":
        """A tensor in memory, to be written."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor.detach(), "memory")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The data; raises ValueError, naming the file and the tensor, if it holds NaN or inf."""
        tensor = self.read()
        if tensor.is_floating_point() and tensor.numel():
            comparable = tensor if tensor.dtype.itemsize > 1 else tensor.float()
            if not all(math.isfinite(extreme.item()) for extreme in comparable.aminmax()):
                bad = (~torch.isfinite(comparable)).nonzero()
                raise ValueError(
                    f"{self.file}: tensor {self.name!r} holds {len(bad)} NaN or inf, the first at "
                    f"{bad[0].tolist()}; expected finite numbers"
                )
        return tensor


def read_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name: headers are read and checked, the data is not.

    Reads safetensors, single or sharded by an index, and PyTorch's .bin, single or sharded, as weights only.

    Raises:
        FileNotFoundError: no such folder, no weights in it, or a file of the index is missing.
        ValueError: a file that is corrupt or truncated, a pickle of more than weights, or an index that does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a local folder that holds a checkpoint")
    index, files = _weight_files(folder)
    weight_map = read_json(index).get("weight_map") if index else None
    if index:
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map; expected tensor names and their files")
        files = [folder / file for file in sorted(set(weight_map.values()))]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {index} names it")
        for tensor in read_safetensors(file) if file.suffix == ".safetensors" else _pickled_tensors(file):
            if weight_map is None or weight_map.get(tensor.name) == file.name:
                tensors[tensor.name] = tensor
    for name in weight_map or ():
        if name not in tensors:
            raise ValueError(f"{index}: tensor {name!r} is not in {weight_map[name]}")
    return tensors


def _weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index of a folder's shards, or else its weight files."""
    for pattern in ("model.safetensors.index.json", "*.safetensors.index.json"):
        if found := sorted(folder.glob(pattern)):
            return found[0], []
    for pattern in ("model.safetensors", "*.safetensors"):
        if found := sorted(folder.glob(pattern)):
            return None, found
    for pattern in ("pytorch_model.bin.index.json", "pytorch_model.bin"):
        if (folder / pattern).exists():
            return (folder / pattern, []) if pattern.endswith(".json") else (None, [folder / pattern])
    raise FileNotFoundError(
        f"{folder}: holds no weights; expected model.safetensors, pytorch_model.bin, or an index of shards of either"
    )


def read_safetensors(file: Path) -> list[StoredTensor]:
    """The tensors of one file; raises ValueError if it is corrupt or truncated."""

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, "pt") as f:
                return f.get_tensor(name).clone()

        return read

    try:
        with safe_open(file, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({error}); fetch or write it again") from None
    for name, (dtype, _) in headers.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: tensor {name!r} is {dtype}; expected one of {', '.join(_DTYPES)}")
    return [StoredTensor(name, _DTYPES[dtype], shape, reader(name), file) for name, (dtype, shape) in headers.items()]


def _pickled_tensors(file: Path) -> list[StoredTensor]:
    mapped = zipfile.is_zipfile(file)  # files from before PyTorch 1.6 cannot be mapped

    def open_file() -> dict[str, Tensor]:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        state = open_file()
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{file}: is not a pickle of weights alone, and no other is opened, since it may run code ({reason}); "
            "expected tensors by name, or safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file}: is not a whole PyTorch file ({error}); fetch or write it again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file}: holds a {type(state).__name__} of more than tensors; expected tensors by name")

    def reader(name: str) -> Callable[[], Tensor]:
        if not mapped:
            return lambda: state[name].clone()
        return lambda: open_file()[name].clone()

    return [StoredTensor(name, t.dtype, tuple(t.shape), reader(name), file) for name, t in state.items()]


def write_tensors(
    folder: Path, tensors: Iterable[StoredTensor], *, stem: str = "model", max_shard_size: int | str = "5GB"
) -> None:
    """Writes tensors as safetensors, one tensor in memory at a time: one file, or shards and their index."""
    shards = plan_shards(tensors, stem=stem, max_shard_size=max_shard_size)
    for name, shard in shards.items():
        write_shard(folder / name, shard)
    write_index(folder, shards, stem=stem)


def plan_shards(
    tensors: Iterable[StoredTensor], *, stem: str, max_shard_size: int | str
) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, in their order, each file up to max_shard_size (or one tensor, if that is larger)."""
    limit = parse_size(max_shard_size)
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(file: Path, tensors: list[StoredTensor]) -> None:
    """One safetensors file, written tensor by tensor under a temporary name.

    Raises:
        OSError: the disk is full, or a device error; nothing is left of the file.
    """
    # Readers map the file: the widest type first keeps each tensor aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for t in tensors:
        end = offset + t.nbytes
        header[t.name] = {"dtype": _DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with new_file(file) as f:
        f.write(struct.pack("<Q", len(encoded)) + encoded)
        for t in tensors:
            data = t.load()
            if data.shape != t.shape or data.dtype != t.dtype:
                raise ValueError(f"{t.file}: tensor {t.name!r} changed while it was read")
            f.write(memoryview(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def write_index(folder: Path, shards: Mapping[str, list[StoredTensor]], *, stem: str) -> None:
    """`<stem>.safetensors.index.json`, where there is more than one shard."""
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def parse_size(size: int | str) -> int:
    """Bytes: an integer, or a string such as "5GB", "500MB", "1GiB".

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    bytes_ = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")) if match else 0
    if bytes_ < 1:
        raise ValueError(f"max_shard_size: is {size!r}; expected bytes or a size such as '5GB' or '500MiB'")
    return bytes_


def read_json(file: Path) -> dict[str, Any]:
    """The object a JSON file holds; raises ValueError, naming the file, if it holds none."""
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}; expected an object")
    return value
