"""Checkpoint files: tensors are read, checked and written one at a time; files are written atomically."""

import functools
import hashlib
import json
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import SmileError, naming
from .publishing import fingerprint, is_path, new_file, write_text

# The config of a complete checkpoint names this missing file as its only weight file; our quantizer removes the name.
# Without the quantizer, transformers then raises an error instead of loading the base model with a warning.
NO_WEIGHTS = "needs_smile_kernels.safetensors"
# In bytes: configs and chat templates, and tokenizers and all other text. The largest in use have a tenth of it.
_LARGEST_CONFIG, _LARGEST_TEXT = 1 << 26, 1 << 28
_READ_WHOLE = re.compile(
    r".*config\.json|(tokenizer|vocab|merges|added_tokens|special_tokens|chat_template).*|.*\.jinja"
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its header, and a function that reads the data.

    Args:
        name, dtype, shape: from the file's header.
        read: returns the data as a new tensor.
        file: its file, for messages.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    file: str | Path

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "StoredTensor":
        """A tensor in memory, to be written.

        Raises:
            ValueError: safetensors cannot hold it.
        """
        if not isinstance(tensor, Tensor):
            raise SmileError(f"{name}: is a {type(tensor).__name__}; expected a tensor, as safetensors holds")
        if name == "__metadata__" or tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES:
            raise SmileError(
                f"{name}: is a {tensor.dtype} tensor of layout {tensor.layout}; expected a name other than "
                f"__metadata__, torch.strided, and one of {', '.join(map(str, _DTYPE_NAMES))}"
            )
        return cls(
            name, tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().resolve_conj().resolve_neg(), "memory"
        )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The data; raises ValueError, naming the file and the tensor, if it contains NaN or inf."""
        return self.load_with_peak()[0]

    def load_with_peak(self) -> tuple[Tensor, float]:
        """`load`, and the largest magnitude in it; 0 for integers."""
        tensor = self.read()
        if tensor.is_meta:
            raise SmileError(f"{self.file}: tensor {self.name!r} is on the meta device; expected its data")
        if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
            return tensor, 0.0
        comparable = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        comparable = comparable if comparable.dtype.itemsize > 1 else comparable.float()
        extremes = [extreme.item() for extreme in comparable.aminmax()]
        if not all(map(math.isfinite, extremes)):
            bad = (~torch.isfinite(comparable)).nonzero()
            raise SmileError(
                f"{self.file}: tensor {self.name!r} holds {len(bad)} NaN or inf, the first at "
                f"{bad[0].tolist()}; expected finite numbers"
            )
        return tensor, max(map(abs, extremes))


def read_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name. Headers are read and checked; data is not read.

    Reads safetensors, single or sharded by an index, and PyTorch's .bin, single or sharded, as weights only.

    Raises:
        FileNotFoundError: the folder does not exist, has no weights, or lacks a file of the index.
        ValueError: a corrupt or truncated file, a pickle with other objects than weights, or an invalid index.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; expected a local folder with a checkpoint")
    index, files = _weight_files(folder)
    weight_map = _read_weight_map(index) if index else None
    if weight_map is not None:
        files = [folder / file for file in sorted(set(weight_map.values()))]
    else:
        _check_shards(files)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            kind = "a link to a missing file" if file.is_symlink() else "no such file"
            kind = "not a regular file" if file.exists() else kind
            raise FileNotFoundError(f"{file}: {kind}" + (f"; {index} names it" if index else ""))
        for tensor in read_safetensors(file) if file.suffix == ".safetensors" else read_pickled(file):
            place = file.name if weight_map is None else weight_map.get(tensor.name)
            if place is None:
                continue
            if place != file.name or tensor.name in tensors:
                other = folder / place if place != file.name else tensors[tensor.name].file
                raise SmileError(f"{file}: tensor {tensor.name!r} is in {other}, too; expected one")
            tensors[tensor.name] = tensor
    for name, held in (weight_map or {}).items():
        if name not in tensors:
            raise SmileError(f"{index}: tensor {name!r} is not in {folder / held}; expected it there")
    return tensors


def _weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index of a folder's shards, or its weight files, chosen in the order of from_pretrained."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = config.get("transformers_weights")
    if named is not None and not _is_weight_file(named):
        raise SmileError(
            f"{folder / 'config.json'}: transformers_weights is {named!r}; expected a weight file of the same folder"
        )
    if named not in (None, NO_WEIGHTS) and not (folder / named).is_file():
        raise FileNotFoundError(f"{folder / named}: no such file; expected it, since {folder / 'config.json'} names it")
    own = [] if named in (None, NO_WEIGHTS) else [named]
    for stem in (*own, "model.safetensors", "pytorch_model.bin", "experts.safetensors"):
        if (folder / stem).exists():
            return None, [folder / stem]
        if (folder / f"{stem}.index.json").exists():
            return folder / f"{stem}.index.json", []
    if found := sorted(folder.glob("*.safetensors.index.json")):
        return found[0], []
    if found := sorted(folder.glob("*.safetensors")):
        return None, found
    raise FileNotFoundError(
        f"{folder}: contains no weights; expected model.safetensors, pytorch_model.bin, or an index of shards of either"
    )


def weights_fingerprint(folder: str | Path) -> str | None:
    """A hash of a checkpoint's weight files, which are read; None without such files."""
    try:
        index, files = _weight_files(Path(folder))
    except FileNotFoundError:
        return None
    if index is not None:
        files = [index.parent / name for name in sorted(set(_read_weight_map(index).values()))]
    hashes = [(file.name, fingerprint(Path(os.path.realpath(file)))) for file in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SmileError(f"{index}: has no weight_map; expected tensor names and their files")
    for name, file in weight_map.items():
        if not _is_weight_file(file):
            raise SmileError(f"{index}: weight_map[{name!r}] is {file!r}; expected a weight file of the same folder")
    return weight_map


def _is_weight_file(name: Any) -> bool:
    """Whether this is the name of a weight file without a folder."""
    return isinstance(name, str) and Path(name).name == name and Path(name).suffix in (".safetensors", ".bin")


def _check_shards(files: list[Path]) -> None:
    """Raise FileNotFoundError if shards are missing, according to names such as `...-00001-of-00003`."""
    names = {file.name for file in files}
    for file in files:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\.\w+)", file.name):
            stem, number, total, suffix = match.groups()
            for i in range(1, min(int(total), 100_000) + 1):
                shard = f"{stem}{i:0{len(number)}}-of-{total}{suffix}"
                if shard not in names:
                    raise FileNotFoundError(f"{file.with_name(shard)}: no such file; {file.name} implies it")


def read_safetensors(file: Path) -> list[StoredTensor]:
    """The tensors of one file; raises ValueError if the file is corrupt or truncated."""
    _check_regular(file)
    try:
        with errors_of_system(file), safe_open(file, "pt"), open(file, "rb") as f:  # safe_open checks the header
            length, stamp = int.from_bytes(f.read(8), "little"), _stamp(os.fstat(f.fileno()))
            header = json.loads(f.read(length))
    except (SafetensorError, ValueError) as error:
        raise SmileError(f"{file}: is not a whole safetensors file ({error}); fetch or write it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise SmileError(f"{file}: tensor {name!r} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")

    def stored(name: str, entry: dict[str, Any]) -> StoredTensor:
        dtype, shape, start = _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        return StoredTensor(name, dtype, shape, functools.partial(_read_at, file, stamp, start, dtype, shape), file)

    return [stored(name, entry) for name, entry in header.items()]


def _read_at(file: Path, stamp: tuple[int, ...], start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of an uncompressed file without its header, whose reading takes time in proportion to all tensors."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    with naming(file), open(file, "rb") as f:
        f.seek(start)
        if f.readinto(data) != data.nbytes or _stamp(os.fstat(f.fileno())) != stamp:
            raise SmileError(
                f"{file}: changed while it was read (it is another file, or has another size or time); fetch or write "
                "it again"
            )
    return tensor


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; that of a PyTorch file is empty."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as f:
        return dict(f.metadata() or {})


def read_pickled(file: Path) -> list[StoredTensor]:
    """The tensors of one PyTorch file, opened as weights only; raises ValueError if it is damaged or no checkpoint."""
    _check_regular(file)
    stamp = _stamp(os.stat(file))
    mapped = zipfile.is_zipfile(file)  # files from before PyTorch 1.6 cannot be mapped

    def open_file() -> dict[str, Tensor]:
        with errors_of_system(file):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        state = open_file()
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"unsupported [^\n]*?(?= was not an allowed| whose module|$)", str(error), re.M | re.I)
        reason = found[0] if found else "it cannot be read as weights"
        raise SmileError(
            f"{file}: is a pickle of other objects than weights and is not opened, since it may run code ({reason}); "
            "expected tensors by name, or safetensors"
        ) from None
    except Exception as error:  # any exception of an unpickler for bytes of another kind
        raise SmileError(f"{file}: is not a whole PyTorch file ({error}); fetch or write it again") from None
    if not isinstance(state, dict):
        raise SmileError(f"{file}: contains a {type(state).__name__}; expected tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise SmileError(f"{file}: contains a {type(tensor).__name__} as {name!r}; expected tensors by name")
        if tensor.is_meta:
            raise SmileError(f"{file}: tensor {name!r} is on the meta device; expected its data")
        if tensor.is_nested or tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES:
            raise SmileError(
                f"{file}: tensor {name!r} is {tensor.layout} {tensor.dtype}; expected a dense tensor of one of "
                f"{', '.join(map(str, _DTYPE_NAMES))}"
            )

    def read_again(name: str) -> Tensor:
        try:
            return open_file()[name].clone()
        except OSError:
            raise
        except Exception as error:  # any exception of an unpickler for bytes of another kind
            raise SmileError(f"{file}: changed while it was read ({error}); fetch or write it again") from None

    with errors_of_system(file):
        starts = _starts(file, state) if mapped else {}

    def reader(name: str) -> Callable[[], Tensor]:
        if not mapped:
            return lambda: state[name].clone()
        if name not in starts:
            return lambda: read_again(name)
        place = file, stamp, starts[name], state[name].dtype, tuple(state[name].shape)
        return functools.partial(_read_at, *place)

    return [StoredTensor(name, t.dtype, tuple(t.shape), reader(name), file) for name, t in state.items()]


def _starts(file: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Where the data of mapped tensors begins in their file; {} where storages and records are not the same."""
    records: Any = torch._C.PyTorchFileReader(str(file))
    if records.has_record("byteorder") and records.get_record("byteorder").decode() != sys.byteorder:
        return {}
    names = [name for name in records.get_all_records() if name.startswith("data/")]
    offsets = sorted(map(records.get_record_offset, names))
    addresses = sorted({tensor.untyped_storage().data_ptr() for tensor in state.values()})
    if not offsets or [one - addresses[0] for one in addresses] != [one - offsets[0] for one in offsets]:
        return {}
    plain = {name: t for name, t in state.items() if t.is_contiguous() and not t.is_conj() and not t.is_neg()}
    return {name: t.data_ptr() - addresses[0] + offsets[0] for name, t in plain.items() if t.numel()}


def write_tensors(
    folder: Path, tensors: Iterable[StoredTensor], *, stem: str = "model", max_shard_size: int | str = "5GB"
) -> None:
    """Write tensors as safetensors, one tensor in memory at a time: one file, or shards and their index."""
    shards = plan_shards(tensors, stem=stem, max_shard_size=max_shard_size)
    for name, shard in shards.items():
        write_shard(folder / name, shard)
    write_index(folder, shards, stem=stem)


def add_tensors(folder: Path, tensors: list[StoredTensor], *, file: str) -> None:
    """Add tensors to a safetensors checkpoint: in a new `file` if it is sharded, else in its only file.

    Tensors of the same names are replaced.
    """
    index, files = _weight_files(folder)
    names = {tensor.name for tensor in tensors}
    if index is None:
        kept = [tensor for tensor in read_safetensors(files[0]) if tensor.name not in names]
        write_shard(files[0], [*kept, *tensors], read_metadata(files[0]))
        return
    write_shard(folder / file, tensors)
    stored = read_json(index)
    added = sum(t.nbytes for t in tensors if t.name not in stored["weight_map"])
    stored["weight_map"] |= dict.fromkeys(names, file)
    stored["metadata"]["total_size"] += added
    write_text(index, json.dumps(stored, indent=2) + "\n")


def plan_shards(
    tensors: Iterable[StoredTensor], *, stem: str, max_shard_size: int | str
) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, in order; files have up to max_shard_size bytes, or one larger tensor."""
    limit = parse_size(max_shard_size)
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(file: Path, tensors: list[StoredTensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write one safetensors file tensor by tensor, atomically.

    Raises:
        OSError: the disk is full, or a device error; the file is removed.
    """
    # Readers map the file: the widest type first keeps each tensor aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Mapping[str, object]] = {"__metadata__": {**metadata, "format": "pt"}}
    offset = 0
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
                raise SmileError(f"{t.file}: tensor {t.name!r} changed while it was read")
            f.write(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def errors_of_system(file: Path) -> Iterator[None]:
    """What PyTorch and safetensors raise where the system cannot open, map, write or close, as OSError with a name."""
    try:
        with naming(file):
            yield
    except (SafetensorError, OSError, RuntimeError) as error:
        ours = r"\(os error (\d+)\)|(?:unable to (?:open|stat|mmap)|[Ee]rror closing file) .*\((\d+)\)"
        code = re.search(ours, str(error))
        if code is None:
            raise
        number = int(code[1] or code[2])
        raise OSError(number, os.strerror(number), str(file)) from None


def write_index(folder: Path, shards: Mapping[str, list[StoredTensor]], *, stem: str) -> None:
    """Write `<stem>.safetensors.index.json` if there is more than one shard."""
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def parse_size(size: int | str) -> int:
    """Number of bytes from an integer or a string such as "5GB", "500MB", "1GiB".

    Raises:
        ValueError: anything else, or less than one byte.
    """
    text = "" if isinstance(size, float) else str(size).strip().upper()
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(I?)B?", text)
    bytes_ = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")) if match else 0
    if bytes_ < 1:
        raise SmileError(f"max_shard_size: is {size!r}; expected bytes or a size such as '5GB' or '500MiB'")
    return bytes_


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, naming the file, if there is none."""
    return parse_json(read_text(file), str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The object in a JSON text; raises ValueError, whose message begins with `where`, if there is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SmileError(f"{where}: is not JSON ({error})") from None
    except (ValueError, RecursionError) as error:  # ValueError: Python reads no number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise SmileError(f"{where}: cannot be read as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise SmileError(f"{where}: contains a {type(value).__name__}; expected an object")
    return value


def _check_regular(file: Path) -> None:
    """Refuse pipes, which would block; raises OSError where the file cannot be opened."""
    if file.exists() and not file.is_file():
        raise SmileError(f"{file}: is not a regular file; expected a file of weights")
    with naming(file):
        file.open("rb").close()


def check_sizes(folder: str | Path) -> None:
    """Raises ValueError if a text file of a checkpoint that other libraries read whole is too large to be one."""
    for file in (*Path(folder).iterdir(), *Path(folder).glob("additional_chat_templates/*")):
        if _READ_WHOLE.fullmatch(file.name) and file.is_file():
            _check_size(file, None)


def _check_size(file: Path, limit: int | None) -> None:
    limit = limit or (_LARGEST_CONFIG if file.name.endswith(("config.json", ".jinja")) else _LARGEST_TEXT)
    size = file.stat().st_size
    if size > limit:
        raise SmileError(f"{file}: has {size:,} bytes; expected at most {limit:,}")


def read_text(file: Path, limit: int | None = None) -> str:
    """The text of a file.

    Raises:
        ValueError: not a regular file, more than `limit` bytes (by default those of a text file of checkpoints), or
            not UTF-8.
    """
    if not is_path(file):
        raise SmileError(f"{str(file)!r}: is not a path that a file can have; expected one without a null character")
    if file.exists() and not file.is_file():
        raise SmileError(f"{file}: is not a regular file; expected a text file")
    _check_size(file, limit)
    try:
        with naming(file):
            return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SmileError(f"{file}: is not UTF-8 text ({error})") from None
