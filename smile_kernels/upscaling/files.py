"""Files next to the weights, such as tokenizers: the base's, which are copied, and those of experts, which are not."""

import errno
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..checkpoint import REPORT
from ..errors import SmileError
from ..publishing import LONGEST_NAME, MANIFEST, paths
from .comparison import TOKENIZER, differs, templates
from .report import LostFile

__all__ = ["check_tokenizer", "files_beside", "listing", "lost_files"]

# Weights and what trainers store, by their suffixes and usual names: these files of the base are not copied.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ot|index\.json)")
_USUAL = re.compile(
    r"(((open_clip_|diffusion_)?pytorch_|open_clip_|tf_|flax_|rust_|adapter_)?model|consolidated|experts|router_prior"
    r"|training_args|optimizer|scheduler|scaler|rng_state|random_states).*|.*\.index\.json"
)
_LARGEST = 1 << 28  # bytes of a file of this kind that has another name, and is copied

# Folders that are copied whatever they contain: sentence-transformers' pooling and later modules, transformers' further
# chat templates, Bark's voices. Others are if they have files of a tokenizer or a processor, and no weights.
_FOLDERS = re.compile(r"\d+_.*|additional_chat_templates|speaker_embeddings")
_PROCESSOR = re.compile(r".*processor_config\.json")
# Folders of trainers, and of other formats of the same weights, which are left out without a warning.
_OTHER_FOLDERS = re.compile(r"\..*|__pycache__|(checkpoint-|global_step)\d+|runs|logs|onnx|openvino|coreml|original")

# Logs, and what editors and downloads leave: may change at any time, and has no part in a model.
_PASSING = re.compile(r"\..*|.*(\.(log|out|swp|tmp)(\.\d+)?|~)|events\.out\.tfevents\..*")
# What is read but not copied, except for the state of a training.
_READ = re.compile(
    r"(?!training_args|optimizer|scheduler|scaler|rng_state|random_states).*\.(safetensors|bin|index\.json)"
    rf"|.*config\.json|{REPORT}"
)
# About a model: documents, notes, results and logs of a training. Copied, but they may change at any time.
_ABOUT = re.compile(
    r"(.*/)?((licen[cs]e|notice|use_policy|requirements|trainer_)[^/]*|([^/]+_)?results\.json"
    r"|([^/]+[._-])?(logs?|notes?|todo|changelog)([._-][^/]*)?\.(txt|csv)"
    r"|(?!vocab)[^/]+\.(md|pdf|png|jpe?g|gif|svg|jsonl|ipynb))",
    re.IGNORECASE,
)

# A tokenizer in parts, which tokenizer.json replaces; and the other files that are compared.
_PARTS = re.compile(r"vocab\.\w+|merges\.txt|added_tokens\.json|[\w.-]+\.(model|spm|tiktoken|codes)")
_COMPARED = re.compile(
    r"(.*/)?(tokenizer|tokenizer_config|special_tokens_map|added_tokens|normalizer|entity_vocab)\.json"
    r"|(.*/)?(\w+_)?(pre)?processor_config\.json"
    r"|chat_template\.(jinja|json)|additional_chat_templates/.*|generation_config\.json"
    r"|modules\.json|sentence_\w+_config\.json|config_sentence_transformers\.json|\d+_[^/]*/.*"
    r"|speaker_embeddings/.*|adapter\..*\.safetensors"
)


def files_beside(folder: Path, read: Collection[Path] = (), *, kind: re.Pattern | None = None) -> dict[Path, Path]:
    """The files of a checkpoint that are copied, and their places: tokenizers, settings, code; or of a kind.

    A warning names what else is left out than weights, logs and what trainers store.

    Args:
        folder: the checkpoint.
        read: its weight files.
        kind: the names that are meant; by default all.

    Raises:
        ValueError, OSError: one that cannot be copied.
    """
    found: list[Path] = []
    left_out: list[str] = []
    for file in sorted(folder.iterdir()):
        written_anew = file.name in ("config.json", "README.md", REPORT, MANIFEST)
        if written_anew or _passes(file.name) or file in read or (kind and not kind.fullmatch(file.name)):
            continue
        if file.is_dir() and _is_copied(file):
            inside = [] if file.is_symlink() else paths(file)
            found += [one for one in inside if not (_is_folder(one) or _passes(one.relative_to(folder)))]
            found += [file] if file.is_symlink() else []
        elif not (file.is_dir() or _WEIGHTS.fullmatch(file.name)) or _is_small_data(file):
            found.append(file)
        elif not (_OTHER_FOLDERS if file.is_dir() else _USUAL).fullmatch(file.name):
            left_out.append(file.name + os.sep * file.is_dir())
    if left_out and kind is None:
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        warnings.warn(
            f"base: {folder}: not copied to the result: {', '.join(left_out[:10])}{more}. If the model needs them, "
            "copy them there",
            stacklevel=3,
        )
    for file in found:
        if not file.exists():
            raise FileNotFoundError(f"{file}: is a link to a missing file; expected the file, which is copied")
        if not file.is_file():
            raise SmileError(f"{file}: is not a regular file; expected one, since it is copied")
        if len(os.fsencode(file.name)) > LONGEST_NAME:
            raise SmileError(
                f"{file}: has a name of more than {LONGEST_NAME} bytes, and is copied; expected a shorter one"
            )
        if not os.access(file, os.R_OK):
            raise PermissionError(
                errno.EACCES, "cannot be read; expected a file that can, since it is copied", str(file)
            )
    return {file: file.relative_to(folder) for file in found}


def _is_small_data(file: Path) -> bool:
    """Whether a file with a suffix of weights is other data, such as the voices or adapters of a speech model."""
    weights = file.suffix == ".safetensors" and not file.name.startswith("adapter.")  # vLLM loads every such file
    if file.is_dir() or weights or _USUAL.fullmatch(file.name):
        return False
    return not file.is_file() or file.stat().st_size <= _LARGEST


def _is_copied(folder: Path) -> bool:
    """Whether a folder of a checkpoint is one of those that are copied."""
    if _FOLDERS.fullmatch(folder.name):
        return True
    if folder.is_symlink() or _OTHER_FOLDERS.fullmatch(folder.name) or not os.access(folder, os.R_OK | os.X_OK):
        return False
    if not any(TOKENIZER.fullmatch(one.name) or _PROCESSOR.fullmatch(one.name) for one in folder.iterdir()):
        return False
    files = [file for file in paths(folder) if file.is_file()]
    return not any(_WEIGHTS.fullmatch(file.name) or file.stat().st_size > _LARGEST for file in files)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _passes(name: str | Path) -> bool:
    """Whether a file, or a folder that contains it, has no part in a model."""
    return any(_PASSING.fullmatch(part) for part in Path(name).parts)


def listing(folder: Path, result: Mapping[Path, Path] = MappingProxyType({})) -> list[tuple[str, int, int]]:
    """Name, size and modification time of each file of a folder that is read, compared or, with an effect, copied.

    Args:
        folder: a checkpoint.
        result: as in `lost_files`.
    """
    files = dict(_files(folder, _alike(result)))
    files |= {one.name: one for one in folder.iterdir() if _READ.fullmatch(one.name) and one.is_file()}
    stats = [(name, files[name].stat()) for name in sorted(files)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def lost_files(base: Path, experts: Sequence[Path], result: Mapping[Path, Path]) -> list[LostFile]:
    """The files that experts have otherwise than the base and the result; a file that an expert lacks is the base's.

    Args:
        base, experts: the folders.
        result: the files that are copied to the result -> their places there.
    """
    config = {"config.json": base / "config.json"}
    others = [
        config | {str(place): file for file, place in result.items()},
        config | dict(_files(base, _alike(result))),
    ]
    their_templates = [templates(other) for other in others]
    found: dict[str, list[int]] = {}
    for i, folder in enumerate(experts):
        own = dict(_files(folder, _alike(result)))
        for name, template in templates(own).items():
            if all(other.get(name) != template for other in their_templates):
                found.setdefault(name, []).append(i)
        for name, file in own.items():
            whole = str(Path(name).with_name("tokenizer.json")) in own
            part = _PARTS.fullmatch(file.name) or TOKENIZER.fullmatch(file.name)
            repeated = whole and part and not _COMPARED.fullmatch(name)
            if file.suffix == ".jinja" or name.startswith("chat_template.") or repeated:
                continue
            if all(differs(name, file, other) for other in others):
                found.setdefault(name, []).append(i)
    return [LostFile(name, found[name]) for name in sorted(found)]


def _alike(result: Mapping[Path, Path]) -> set[str]:
    """The files of the result that experts may have otherwise."""
    return {name for place in result.values() if not _ABOUT.fullmatch(name := str(place))}


def check_tokenizer(where: str, base: Path, expert: Path) -> None:
    """Raise ValueError if the base has the tokens of a tokenizer, and the expert whose tokens are added has none."""
    whole = re.compile(rf"tokenizer\.json|(?!added_tokens)({_PARTS.pattern})")
    with_one = [any(whole.fullmatch(name) and file.stat().st_size for name, file in _files(f)) for f in (base, expert)]
    if with_one == [True, False]:
        raise SmileError(
            f"{where}: {expert} has no tokenizer with its tokens (tokenizer.json, a vocabulary), and the base has one "
            "without the added tokens; expected the expert's tokenizer in its folder"
        )


def _files(folder: Path, more: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """The files that may be compared, by their paths in the folder, and those of the names `more`."""
    for one in sorted(folder.iterdir()):
        for file in [one] if one.is_symlink() or not one.is_dir() else paths(one) if _is_copied(one) else []:
            name = str(file.relative_to(folder))
            compared = (_COMPARED.fullmatch(name) or _PARTS.fullmatch(file.name)) and not _passes(name)
            about = re.match(r"\d+_", name) and _ABOUT.fullmatch(name)  # of a folder whose files are all compared
            if compared and not about and name not in more and file.is_file():
                yield name, file
    yield from ((name, folder / name) for name in sorted(more) if (folder / name).is_file())
