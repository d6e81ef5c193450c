"""The settings of `upscale`, and of other commands, from their options and YAML files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import SmileError
from .schema import KNOWN_KEYS_ONLY, parse

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class _Model:
    """An entry of `models` in a YAML file."""

    model: str
    name: str | None = None

    __pydantic_config__ = KNOWN_KEYS_ONLY


@dataclass(frozen=True)
class _Parameters:
    """`parameters` in a YAML file: arguments of `upscale_checkpoints`."""

    rank_of_expert: int | float | None = None
    rank_of_router: int | None = None
    router: str | None = None
    num_experts_per_tok: int | None = None
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    remaining: str | None = None
    embeddings_from: int | str | None = None
    routing: dict[str, Any] | None = None
    calibrate: bool | None = None

    __pydantic_config__ = KNOWN_KEYS_ONLY


@dataclass(frozen=True)
class _Recipe:
    """A YAML file."""

    base_model: str | None = None
    models: list[_Model] | None = None
    dtype: str | None = None
    parameters: _Parameters = _Parameters()

    __pydantic_config__ = KNOWN_KEYS_ONLY


def settings_of(config: Path | None, given: dict[str, Any], out: str | None) -> dict[str, Any]:
    """The settings of the YAML file and of the options; each may be set only once."""
    settings = settings_of_yaml(config) if config else {}
    for name in given:
        if name in settings:
            raise SmileError(f"{name}: is given as an option and in {config}; expected one of the two")
    settings |= given
    needed = ["base", "experts", "rank_of_expert"]
    if settings.get("router", "smile") == "smile":  # the others set it
        needed.append("rank_of_router")
    for name in needed:
        if name not in settings:
            option = {"experts": "expert"}.get(name, name).replace("_", "-")
            raise SmileError(f"{name}: is not given; expected --{option}, or a YAML file that sets it")
    if out is None:
        raise SmileError("out: is not given; expected --out FOLDER")
    return {**settings, "out": out}


def settings_of_yaml(file: Path) -> dict[str, Any]:
    """Settings of `upscale_checkpoints` from a YAML file similar to mergekit's."""
    import yaml

    from .storage import read_text  # loads torch

    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a YAML file")
    text = read_text(file, limit=1 << 16)
    try:
        depth = 0
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise SmileError(f"{file}: contains an alias, *{event.anchor}; expected its value")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 16:  # the scanner's time grows with the square of it
                raise SmileError(f"{file}: has more than 16 nested lists and mappings; expected settings")
        if twice := _repeated_key(yaml.compose(text, yaml.SafeLoader)):
            raise SmileError(f"{file}: sets {twice} twice; expected one value")
        content = yaml.safe_load(text)
    except SmileError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise SmileError(f"{file}: is not YAML: {error}") from None
    recipe = parse(_Recipe, content, str(file))
    settings: dict[str, Any] = {"base": recipe.base_model, "dtype": recipe.dtype, **asdict(recipe.parameters)}
    if recipe.models is not None:
        settings |= _experts([(model.name, model.model) for model in recipe.models])
    for name in ("include", "exclude"):
        settings[name] = [settings[name]] if isinstance(settings[name], str) else settings[name]
    return {name: value for name, value in settings.items() if value is not None}


def _repeated_key(node: Any) -> str | None:
    """A key that a mapping in a YAML document has twice; YAML readers take the last value."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        return twice or next((found for _, value in node.value if (found := _repeated_key(value))), None)
    if isinstance(node, yaml.SequenceNode):
        return next((found for value in node.value if (found := _repeated_key(value))), None)
    return None


def named_experts(experts: list[str] | None) -> dict[str, Any]:
    """The settings of --expert NAME=FOLDER, or FOLDER, which may contain a = itself."""
    pairs: list[tuple[str | None, str]] = []
    for expert in experts or ():
        name, sign, folder = expert.partition("=")
        named = bool(sign) and not Path(expert).exists()
        if named and not (name and folder):
            raise SmileError(f"expert: is {expert!r}; expected FOLDER or NAME=FOLDER")
        pairs.append((name, folder) if named else (None, expert))
    return _experts(pairs) if pairs else {}


def _experts(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The settings of experts with their names, None for an expert without one."""
    names, folders = [name for name, _ in pairs], [folder for _, folder in pairs]
    return {"experts": folders} | ({} if names.count(None) == len(names) else {"expert_names": names})


def policy_fields(
    scope: str | None,
    accumulate: bool,
    lock_after: int | None,
    half_life: float | None,
    window: int | None,
    top_p: float | None,
    calibrated: bool,
) -> dict[str, Any] | None:
    """The fields of the routing policy set by options; None if none is set."""
    policy = {"scope": scope, "accumulate": accumulate or None, "lock_after": lock_after, "half_life": half_life}
    policy |= {"window": window, "top_p": top_p}
    policy = {name: value for name, value in policy.items() if value is not None}
    return policy | ({"calibrated": True} if calibrated else {}) if policy else None


def scope_or_fields(text: str) -> Any:
    """The policy of --routing."""
    from .routing import RoutingPolicy
    from .storage import parse_json

    if not text.lstrip().startswith("{"):
        return RoutingPolicy.from_dict({"scope": text})
    return RoutingPolicy.from_dict(parse_json(text, "routing"))


def number(name: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise SmileError(f"{name}: is {text!r}; expected a number")


def dtype_of(torch: Any, name: Any, known: tuple[str, ...] = DTYPES) -> Any:
    if name not in known:
        raise SmileError(f"dtype: is {name!r}; expected {listed(known)}")
    return getattr(torch, name)


def listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
