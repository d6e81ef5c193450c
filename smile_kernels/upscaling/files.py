"""Files next to the weights that determine an expert's results, such as its tokenizer, and are not in the result."""

import filecmp
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SmileError
from ..publishing import paths
from ..storage import read_text
from .report import LostFile

__all__ = ["check_tokenizer", "lost_files"]

# A tokenizer in parts, which tokenizer.json replaces; and the other files that are compared.
_PARTS = re.compile(r"vocab\.\w+|merges\.txt|added_tokens\.json|[\w.-]+\.(model|spm|tiktoken|codes)")
_COMPARED = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|chat_template\.(jinja|json)|additional_chat_templates/.*"
    r"|generation_config\.json|(\w+_)?(pre)?processor_config\.json"
    r"|modules\.json|sentence_\w+_config\.json|config_sentence_transformers\.json|\d+_[^/]*/.*"
)
# Settings without an effect on a result: versions, names of classes, padding and truncation, which a call determines.
_NO_EFFECT = re.compile(r"_.*|version|transformers_version|\w+_class|\w+_type|padding|truncation|pad_token\w*")
# Of tokenizer_config.json, whose other settings repeat tokenizer.json.
_OF_TOKENIZER = re.compile(r"(add|do|split)_\w+|(bos|eos|unk|cls|sep|mask)_token")
_TEMPLATE = "chat_template.jinja"


def lost_files(base: Path, experts: Sequence[Path], result: Mapping[Path, Path]) -> list[LostFile]:
    """The files that experts have otherwise than the base and the result; a file that an expert lacks is the base's.

    Args:
        base, experts: the folders.
        result: the files that are copied to the result -> their places there.
    """
    others = [{str(place): file for file, place in result.items()}, dict(_files(base))]
    found: dict[str, list[int]] = {}
    for i, folder in enumerate(experts):
        own = dict(_files(folder))
        compared = [name for name in own if _COMPARED.fullmatch(name) or "tokenizer.json" not in own]
        if (template := _template(own)) is not None and all(_template(other) != template for other in others):
            found.setdefault(_TEMPLATE, []).append(i)
        for name in compared:
            if not name.startswith("chat_template.") and all(_differs(own[name], other.get(name)) for other in others):
                found.setdefault(name, []).append(i)
    return [LostFile(name, found[name]) for name in sorted(found)]


def check_tokenizer(where: str, base: Path, expert: Path) -> None:
    """Raise ValueError if the base has a tokenizer, and the expert whose tokens are added has none."""
    with_one = [
        any(name.startswith("tokenizer") or _PARTS.fullmatch(name) for name, _ in _files(f)) for f in (base, expert)
    ]
    if with_one == [True, False]:
        raise SmileError(
            f"{where}: {expert} has no tokenizer, and the base has one without the added tokens; expected the expert's "
            "tokenizer in its folder"
        )


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files that may be compared, by their paths in the folder."""
    for one in sorted(folder.iterdir()):
        for file in [one] if one.is_symlink() or not one.is_dir() else paths(one) if "_" in one.name else []:
            name = str(file.relative_to(folder))
            if (_COMPARED.fullmatch(name) or _PARTS.fullmatch(name)) and file.is_file():
                yield name, file


def _template(files: Mapping[str, Path]) -> Any:
    """The chat template, which versions of transformers store in different files; None if there is none."""
    if _TEMPLATE in files:
        return _content(files[_TEMPLATE])
    stored = (_content(files[name]) for name in ("chat_template.json", "tokenizer_config.json") if name in files)
    found = next((one["chat_template"] for one in stored if isinstance(one, dict) and one.get("chat_template")), None)
    if isinstance(found, list):  # several by name; the others are files of their own in later versions
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), found
        )
    return found.strip() if isinstance(found, str) else found


def _differs(own: Path, other: Path | None) -> bool:
    """Whether a file has another content than `other`, JSON by value; also where that is not known."""
    if other is None:
        return True
    try:
        if filecmp.cmp(own, other, shallow=False):
            return False
    except OSError:
        return True
    a, b = _content(own), _content(other)
    if own.name == "tokenizer_config.json" and isinstance(a, dict) and isinstance(b, dict):
        return any(_token(a[name]) != _token(b[name]) for name in a.keys() & b.keys() if _OF_TOKENIZER.fullmatch(name))
    return a is None or a != b


def _token(value: Any) -> Any:
    """A token, which versions of transformers store with its properties or alone."""
    return value.get("content") if isinstance(value, dict) else value


def _content(file: Path) -> Any:
    """The value of a JSON file, without what has no effect; the text of a template; None for anything else."""
    try:
        text = read_text(file) if file.suffix in (".json", ".jinja") else None
        value = text if text is None else text.strip() if file.suffix == ".jinja" else _known(json.loads(text))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return {name: part for name, part in value.items() if not _NO_EFFECT.fullmatch(name)}
    return value


def _known(value: Any) -> Any:
    """A value of a JSON file without null and false, which later versions of a library add."""
    if isinstance(value, list):
        return [_known(part) for part in value]
    if not isinstance(value, dict):
        return value
    known = {name: _known(part) for name, part in value.items() if part is not None and part is not False}
    if isinstance(merges := known.get("merges"), list):  # of pairs, or of pairs joined by a space
        known["merges"] = [" ".join(map(str, one)) if isinstance(one, list) else one for one in merges]
    return known
