"""Whether files next to the weights, such as those of a tokenizer, have the same effect as those of the base."""

import filecmp
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage import read_text

__all__ = ["differs", "templates"]

_TEMPLATE = "chat_template.jinja"
# Settings of a tokenizer, in two files that repeat each other; and those that are often in one file, or in two.
_BOTH = ("special_tokens_map.json", "tokenizer_config.json")
_OF_TOKENIZER = (*_BOTH, "added_tokens.json", "tokenizer.json")
_OF_WORDS = ("added_tokens.json", "entity_vocab.json", "normalizer.json", "vocab.json")  # whose keys are words, tokens
_PROCESSOR = re.compile(r"(\w+_)?(pre)?processor_config\.json")
# What has no effect on a result: versions, names; in a tokenizer also padding and truncation, which a call determines.
_NO_EFFECT = re.compile(r"_.*|version|transformers_version|model_type|(slow_tokenizer|processor)_class|pad_token\w*")
_NO_EFFECT_IN_TOKENIZER = re.compile(
    r"chat_template|name_or_path|\w+_file|files_loaded|fast_tokenizer_files|backend|is_local|local_files_only|verbose"
    r"|max_len(gth)?|init_\w+|deprecation_warnings|(padding|truncation)(_side|_strategy)?"
)
_TYPES = ("image_processor_type", "feature_extractor_type")
# Settings that versions of transformers store with a default where there was none; lengths from 10^6 mean no limit.
_LATER = ("clean_up_tokenization_spaces", "model_max_length")
_NO_LIMIT = 1e6
_ANY_CLASS = ("PreTrainedTokenizer", "TokenizersBackend")  # of any tokenizer.json
# Settings of which an absent one is false, and absent ones of sentence-transformers that have another value.
_FALSE = re.compile(
    r".*/generation_config\.json/\w+|.*/sentence_\w+_config\.json/do_lower_case"
    r"|\d+_[^/]*/config\.json/pooling_mode_(?!mean_tokens)\w+"
)
_DEFAULTS = {"include_prompt": True, "similarity_fn_name": "cosine"}


def templates(files: Mapping[str, Path]) -> dict[str, str]:
    """The chat templates, which versions of transformers store in different files, by their places in the latest."""
    found: dict[str, str] = {}
    for kind in ("tokenizer_config.json", "chat_template.json"):
        for name in (name for name in files if Path(name).name == kind):
            value = _json(files[name])
            stored = value.get("chat_template") if isinstance(value, dict) else None
            if isinstance(stored, list):  # several by name
                stored = {str(one.get("name")): one.get("template") for one in stored if isinstance(one, dict)}
            for key, template in (stored if isinstance(stored, dict) else {"default": stored}).items():
                place = _TEMPLATE if key == "default" else f"additional_chat_templates/{key}.jinja"
                if template:
                    found[str(Path(name).parent / place)] = _rendered(str(template))
    texts = {name: _text(file) for name, file in files.items() if file.suffix == ".jinja"}
    return found | {name: _rendered(text or "") for name, text in texts.items()}


def _rendered(template: str) -> str:
    """A template as Jinja reads it: with one kind of line ends, and without the last one."""
    return re.sub("\r\n?", "\n", template).removesuffix("\n")


def differs(name: str, own: Path, others: Mapping[str, Path]) -> bool:
    """Whether a file has another effect than that of this name in `others`; also where that is not known.

    JSON is compared by value. If a setting of a tokenizer or a preprocessor is on one side only, or has another
    form, both are loaded by transformers, without code from the folders, and compared with the defaults of today.

    Args:
        name: the path of the file in its checkpoint.
        own: the file.
        others: the files of the other checkpoint, by such paths.
    """
    other = others.get(name)
    if other is None and own.name in _OF_TOKENIZER:  # its settings may be in the others
        of_tokenizer = (str(Path(name).with_name(one)) for one in (*_OF_TOKENIZER, "vocab.txt", "vocab.json"))
        other = next((others[one].with_name(own.name) for one in of_tokenizer if one in others), None)
    try:
        if other is None or (other.exists() and filecmp.cmp(own, other, shallow=False)):
            return other is None
    except OSError:
        return True
    first, second = _settings(own), _settings(other)
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first is None or first != second
    pairs = {key: (first.get(key), second.get(key)) for key in first.keys() | second.keys()}
    unlike = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if any(_is_plain(a) and _is_plain(b) and not key.endswith(("_class", "_type")) for key, (a, b) in unlike.items()):
        return True
    unlike = {key: pair for key, pair in unlike.items() if key not in _LATER}
    return bool(unlike) and not _are_alike_when_loaded(own, other, unlike)


def _are_alike_when_loaded(own: Path, other: Path, unlike: Mapping[str, Any]) -> bool:
    """Whether files with these different settings are known to have the same effect."""
    try:
        if _has_code(own.parent) or _has_code(other.parent):
            return False
        if own.name in _OF_TOKENIZER:
            return _tokenizer(own.parent, *_stamps(own.parent)) == _tokenizer(other.parent, *_stamps(other.parent))
        if own.name == "preprocessor_config.json":
            loaded = _processor(own.parent)
            return unlike.keys() <= loaded.keys() | set(_TYPES) and loaded == _processor(other.parent)
    except Exception:  # whatever loading raises: the effect is then not known
        return False
    return False


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    stats = [(one.name, one.stat()) for one in sorted(folder.iterdir()) if one.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


@functools.lru_cache(maxsize=64)
def _tokenizer(folder: Path, *stamps: tuple[str, int, int]) -> str:
    """A digest of all that determines the tokens, except for the chat template, while the files have these stamps."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    inner = json.loads(made.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    special = {name: token for name, token in made.special_tokens_map.items() if name != "pad_token"}
    state = _effective({name: part for name, part in vars(made).items() if name not in _LATER}, tokenizer=True)
    text = json.dumps([inner, special, made.extra_special_tokens, state], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _processor(folder: Path) -> dict[str, Any]:
    """The settings of a processor of images, or one of sounds, with their defaults."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    try:
        made = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError:
        made = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return _effective(made.to_dict())


def _has_code(folder: Path) -> bool:
    """Whether a tokenizer or processor has a class of its own, which may read any setting."""
    return any(
        "auto_map" in (_json(folder / name) or {}) for name in ("tokenizer_config.json", "preprocessor_config.json")
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _settings(file: Path) -> Any:
    """The value of a JSON file without what has no effect; None for another file, and one that cannot be read."""
    kind = file.name
    value = _json(file)
    if kind in _BOTH and isinstance(value, dict):
        [other] = set(_BOTH) - {kind}
        repeated = _json(file.with_name(other))
        value = {**(repeated if isinstance(repeated, dict) else {}), **value}
    if not isinstance(value, dict) or kind in _OF_WORDS:
        return value
    if kind == "tokenizer.json":
        if isinstance(model := value.get("model"), dict) and isinstance(merges := model.get("merges"), list):
            model["merges"] = [" ".join(map(str, one)) if isinstance(one, list) else one for one in merges]
        return {name: part for name, part in value.items() if name not in ("version", "padding", "truncation")}
    place = f"{file.parent.name}/{kind}"
    return {
        name: part
        for name, part in _effective(value, kind in _BOTH, inside=bool(_PROCESSOR.fullmatch(kind))).items()
        if not (part is False and _FALSE.fullmatch(f"{place}/{name}")) and part != _DEFAULTS.get(name)
    }


def _effective(settings: Mapping[str, Any], tokenizer: bool = False, inside: bool = False) -> dict[str, Any]:
    """The settings that have an effect; `inside`: also of those in them."""
    found = {}
    for name, part in settings.items():
        if _NO_EFFECT.fullmatch(name) or (tokenizer and _NO_EFFECT_IN_TOKENIZER.fullmatch(name)):
            continue
        if tokenizer and name == "model_max_length" and isinstance(part, (int, float)) and part >= _NO_LIMIT:
            continue
        if isinstance(part, dict) and name != "auto_map":
            part = _effective(part, tokenizer, inside) if inside else _filled(part)
        elif isinstance(part, str) and name.endswith(("_class", "_type")):  # one class in several implementations
            part = re.sub("(Fast|Pil)$", "", part)
        elif name == "auto_map":  # in the folder, or in the repository that it was loaded from
            part = re.sub(r'"[^"]*--', '"', json.dumps(part))
        if part not in (None, "", [], {}, (), *_ANY_CLASS):
            found[name] = part
    return found


def _filled(part: dict) -> dict:
    """Without null and empty texts, such as those of prompts that are not set."""
    return {name: one for name, one in part.items() if one is not None and one != ""}


def _json(file: Path) -> Any:
    """The value of a JSON file; that of a missing one of a tokenizer is empty, and of others None."""
    if file.name in _OF_TOKENIZER and not file.exists():
        return {}
    try:
        return json.loads(_text(file) or "") if file.suffix == ".json" else None
    except (ValueError, RecursionError):
        return None


def _text(file: Path) -> str | None:
    try:
        return read_text(file)
    except (OSError, ValueError):
        return None
