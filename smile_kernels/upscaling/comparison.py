"""Whether files next to the weights, such as those of a tokenizer, have the same effect as those of the base.

JSON is compared by its settings, in the names of the latest versions, without those that have no effect. Where settings
are on one side only, or have another form, both sides are loaded by transformers, without code from the folders, and
compared with the defaults of today. What cannot be loaded differs. Equal files are parsed and loaded once.
"""

import contextlib
import filecmp
import functools
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage import read_text

__all__ = ["TOKENIZER", "differs", "templates"]

# Files of a tokenizer, by the names that the tokenizers of transformers give them.
TOKENIZER = re.compile(
    r"(tokenizer|added_tokens|special_tokens|(additional_)?chat_template|(target_|entity_)?vocab|merges|normalizer|emoji"
    r"|byte_maps|word_pronunciation|word_shape|bpe\.codes|dict\.txt).*|.*\.(model|spm|tiktoken|tokenizer)"
)
_TEMPLATE = "chat_template.jinja"

# Files of which one may contain what another version of a library stores in the others.
_BOTH = ("special_tokens_map.json", "tokenizer_config.json")  # which repeat each other
_TOKENS = (*_BOTH, "added_tokens.json", "tokenizer.json", "vocab.txt", "vocab.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_GENERATION = ("generation_config.json", "config.json")
_TOGETHER = (_TOKENS, _PROCESSORS, _GENERATION)
_OF_WORDS = ("added_tokens.json", "entity_vocab.json", "normalizer.json", "vocab.json")  # whose keys are words, tokens
_LARGE = ("entity_vocab.json", "tokenizer.json", "vocab.json")

# Settings without an effect: files, settings, and the values that are as good as none, by default any.
_ANY_FILE, _TOKENIZERS, _SENTENCES = r".*", "|".join(map(re.escape, _BOTH)), r"sentence_\w+_config\.json"
_NO_EFFECT: tuple[tuple[str, str, tuple | None], ...] = (
    (_ANY_FILE, r".*", (None, "", [], {}, (), "PreTrainedTokenizer", "TokenizersBackend")),  # of any tokenizer.json
    (
        _ANY_FILE,  # versions, names
        r"_.*|version|transformers_version|model_type|(slow_tokenizer|processor)_class|pad_token\w*",
        None,
    ),
    (
        _TOKENIZERS,  # names, and what a call determines
        r"chat_template|name_or_path|\w+_file|files_loaded|fast_tokenizer_files|backend|is_local|local_files_only"
        r"|verbose|max_len(gth)?|init_\w+|deprecation_warnings|(padding|truncation)(_side|_strategy)?",
        None,
    ),
    (r"tokenizer\.json", "padding|truncation", None),
    (r"generation_config\.json", r".*", (False,)),
    (_SENTENCES, "do_lower_case", (False,)),
    (_SENTENCES, "transformer_task|module_output_name", ("feature-extraction", "token_embeddings")),
    (_SENTENCES, "modality_config", ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},)),
    (r"\d+_[^/]*/config\.json", "include_prompt", (True,)),
    (r"config_sentence_transformers\.json", "similarity_fn_name", ("cosine",)),
)
# Settings that versions of transformers store with a default where there was none; lengths from 10^6 mean no limit.
_LATER = ("clean_up_tokenization_spaces", "model_max_length")
_NO_LIMIT = 1e6
# Flags of sentence-transformers before 5.4, in the order of their outputs, and the names since.
_POOLING = {
    **{"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean"},
    **{"pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens"},
    **{"pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"},
}
# Parts of processor_config.json, which earlier versions store in files of their own, and what loads them.
_PARTS = {
    **{"image_processor": "AutoImageProcessor", "feature_extractor": "AutoFeatureExtractor"},
    **{"audio_processor": "AutoFeatureExtractor", "video_processor": "AutoVideoProcessor"},
}
# Their settings that are others when they are loaded: the class, and parts of "size".
_WHEN_LOADED = {"image_processor_type", "feature_extractor_type", "min_pixels", "max_pixels"}


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

    Args:
        name: the path of the file in its checkpoint.
        own: the file.
        others: the files of the other checkpoint, by such paths, with its config.json.
    """
    other = others.get(name)
    for group in _TOGETHER if other is None else ():
        together = [str(Path(name).with_name(one)) for one in group if own.name in group]
        other = next((others[one].with_name(own.name) for one in together if one in others), other)
    try:
        if other is None or (other.exists() and filecmp.cmp(own, other, shallow=False)):
            return other is None
    except OSError:
        return True
    if own.name == "tokenizer.json" and _are_alike_when_loaded(own, other):  # in less time than both are parsed
        return False
    stored = [value.get("processor_class") for value in map(_json, (own, other)) if isinstance(value, dict)]
    if len({one for one in stored if isinstance(one, str)}) == 2:  # AutoProcessor takes it; some versions omit it
        return True
    first, second = _settings(name, own), _settings(name, other)
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first is None or first != second
    pairs = {key: (first.get(key), second.get(key)) for key in first.keys() | second.keys()}
    unlike = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if any(_is_plain(a) and _is_plain(b) and not key.endswith(("_class", "_type")) for key, (a, b) in unlike.items()):
        return True
    unlike = {key: pair for key, pair in unlike.items() if key not in _LATER}
    moved = own.name not in _TOKENS and not other.exists()
    return bool(unlike or moved) and not _are_alike_when_loaded(own, other, unlike)


def _are_alike_when_loaded(own: Path, other: Path, unlike: Collection[str] = ()) -> bool:
    """Whether files, in which these settings differ, are known to have the same effect."""
    try:
        return _load_alike(own, other, unlike)
    except Exception:  # whatever loading raises: the effect is then not known
        return False


def _load_alike(own: Path, other: Path, unlike: Collection[str]) -> bool:
    kind, folders = own.name, (own.parent, other.parent)
    if any("auto_map" in (_text(folder / one) or "") for folder in folders for one in (*_BOTH, *_PROCESSORS)):
        return False  # classes in the folders may read any setting
    if kind in _TOKENS:
        return _tokenizer(_Contents.of_tokenizer(own.parent)) == _tokenizer(_Contents.of_tokenizer(other.parent))
    if kind not in (*_PROCESSORS, _GENERATION[0]):
        return False
    first, second = map(_processors if kind in _PROCESSORS else _generation, folders)
    video = kind.startswith("video_")
    loaded = {key.rpartition("/")[2] for key in first if key.startswith("video_processor/") == video}
    loaded |= _WHEN_LOADED if loaded else set()
    return bool(first) and first == second and set(unlike) <= first.keys() | {f"*/{key}" for key in loaded}


@dataclass(frozen=True)
class _Contents:
    """Files by what they contain: equal to others with the same names and contents, wherever those are."""

    digests: tuple[tuple[str, str], ...]
    place: Path = field(compare=False)

    @classmethod
    def of_tokenizer(cls, folder: Path) -> "_Contents":
        named = [one for one in sorted(folder.iterdir()) if TOKENIZER.fullmatch(one.name) or one.name == "config.json"]
        return cls(tuple((one.name, _hash(one.read_bytes())) for one in named if one.is_file()), folder)


@functools.lru_cache(maxsize=64)
def _tokenizer(contents: _Contents) -> str:
    """A digest of all that determines the tokens, except for the chat template."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(contents.place, trust_remote_code=False, local_files_only=True)
    inner = made.backend_tokenizer
    inner.no_padding()
    inner.no_truncation()
    special = {name: token for name, token in made.special_tokens_map.items() if name != "pad_token"}
    state = {name: part for name, part in vars(made).items() if name not in _LATER}
    rest = [special, made.extra_special_tokens, _effective("tokenizer_config.json", state)]
    return _digest([inner.to_str(), rest])


def _processors(folder: Path) -> dict[str, Any]:
    """The settings of the processors of images, sounds and videos, with their defaults."""
    import transformers

    found: dict[str, Any] = {}
    for part, kind in _PARTS.items():
        with contextlib.suppress(Exception):  # there is none of this kind
            made = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            found |= _in_part(part, made.to_dict())
    return found


def _generation(folder: Path) -> dict[str, Any]:
    """The settings of generation: where they have no file, those that transformers derives from config.json."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / _GENERATION[0]).exists():
        made = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        made = GenerationConfig.from_model_config(config)
    return _effective(_GENERATION[0], made.to_dict())


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _settings(name: str, file: Path) -> Any:
    """The settings of a JSON file that have an effect; None for another file, and one that cannot be read."""
    kind, value = file.name, _json(file)
    if kind == "modules.json" and isinstance(value, list):
        return [_module(one) for one in value]
    if not isinstance(value, dict) or kind in _OF_WORDS:
        return value
    value = dict(value)  # the parsed one is kept
    if kind in _BOTH:
        [other] = set(_BOTH) - {kind}
        repeated = _json(file.with_name(other))
        value = {**(repeated if isinstance(repeated, dict) else {}), **value}
    elif kind == "processor_config.json":
        parts = [_in_part(part, value.pop(part)) for part in _PARTS if isinstance(value.get(part), dict)]
        return _effective(name, value) | {key: one for part in parts for key, one in part.items()}
    elif kind in _PROCESSORS:
        return {f"*/{key}": one for key, one in _effective(name, value).items()}
    elif re.fullmatch(_SENTENCES, kind):
        tokenizer = _json(file.with_name("tokenizer_config.json"))
        longest = tokenizer.get("model_max_length") if isinstance(tokenizer, dict) else None
        value = value | {"max_seq_length": value.get("max_seq_length") or longest}
    elif re.fullmatch(r"(.*/)?\d+_[^/]*/config\.json", name):
        value = _pooling(value)
    return _effective(name, value)


def _in_part(part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a part of processor_config.json, by their places there, and that it is there."""
    inside = _effective("processor_config.json", settings)
    return {part: True, **{f"{part}/{key}": value for key, value in inside.items()}}


def _pooling(value: dict) -> dict:
    """The configuration of a module of sentence-transformers, in the names since 5.4."""
    value = {re.sub("^word_embedding_dimension$", "embedding_dimension", name): one for name, one in value.items()}
    flags = {flag: value.get(flag, mode == "mean") for flag, mode in _POOLING.items()}
    if "pooling_mode" not in value and all(isinstance(one, bool) for one in flags.values()):
        modes = [mode for flag, mode in _POOLING.items() if flags[flag]]
        return {name: one for name, one in value.items() if name not in flags} | {"pooling_mode": modes}
    stored = value.get("pooling_mode")
    return value | {"pooling_mode": [stored] if isinstance(stored, str) else stored}


def _module(one: Any) -> Any:
    """An entry of modules.json, with the class of sentence-transformers without the package that contains it."""
    stored = one.get("type") if isinstance(one, dict) else None
    if not isinstance(stored, str):
        return one
    return one | {"type": re.sub(r"^(sentence_transformers\.)[\w.]*\.", r"\1", stored)}


def _effective(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file that have an effect."""
    rules = [(keys, values) for files, keys, values in _NO_EFFECT if re.fullmatch(f"(.*/)?({files})", name)]
    found = {}
    for key, value in settings.items():
        form = _form(key, value)
        as_none = [values for keys, values in rules if re.fullmatch(keys, key)]
        if not any(values is None or (type(form), form) in [(type(one), one) for one in values] for values in as_none):
            found[key] = form
    return found


def _form(name: str, value: Any) -> Any:
    """A setting in one form of several with the same effect."""
    if name == "auto_map":  # in the folder, or in the repository that it was loaded from
        return re.sub(r'"[^"]*--', '"', json.dumps(value))
    if name == "eos_token_id" and isinstance(value, list) and len(value) == 1:
        return value[0]
    if name == "model_max_length" and isinstance(value, (int, float)) and value >= _NO_LIMIT:
        return None
    if isinstance(value, str) and name.endswith(("_class", "_type")):  # one class in several implementations
        return re.sub("(Fast|Pil)$", "", value)
    if isinstance(value, dict):  # without texts of prompts that are not set
        return {key: one for key, one in value.items() if one is not None and one != ""}
    return value


def _json(file: Path) -> Any:
    """The value of a JSON file; {} for a missing one whose settings others may contain, and None for other files."""
    if any(file.name in group for group in _TOGETHER) and not file.exists():
        return {}
    text = _text(file) if file.suffix == ".json" else None
    try:
        return None if text is None else _parsed(_Contents(((file.name, _hash(text.encode())),), file))
    except (ValueError, RecursionError):
        return None


@functools.lru_cache(maxsize=256)
def _parsed(contents: _Contents) -> Any:
    """The value of a JSON file; a large one has digests as its parts, or is one digest."""
    value, kind = json.loads(_text(contents.place) or ""), contents.place.name
    if kind not in _LARGE:
        return value
    if kind != "tokenizer.json" or not isinstance(value, dict):
        return [_digest(value)]
    if isinstance(model := value.get("model"), dict) and isinstance(merges := model.get("merges"), list):
        model["merges"] = [" ".join(map(str, one)) if isinstance(one, list) else one for one in merges]
    return {name: part if _is_plain(part) or part is None else [_digest(part)] for name, part in value.items()}


def _digest(value: Any) -> str:
    return _hash(json.dumps(value, sort_keys=True, default=repr).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(file: Path) -> str | None:
    try:
        return read_text(file)
    except (OSError, ValueError):
        return None
