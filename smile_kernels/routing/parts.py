"""The parts of a model, each with tokens of its own: a language model, the towers of CLIP, the stacks of T5."""

import inspect
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

__all__ = ["holds", "parts_of", "text_part"]


def parts_of(model: nn.Module, names: Iterable[str], within: str = "") -> dict[str, list[str]]:
    """The innermost modules with one set of tokens that contain the layers `names`: name -> names of its layers.

    A module with several such parts and layers outside of them is among these, for the layers outside; with one such
    part, all its layers belong to itself.
    """
    inside = [name for name in names if holds(within, name)]
    parts: list[str] = []
    for name, module in model.get_submodule(within).named_modules(prefix=within):
        nested = any(holds(part, name) for part in parts)
        if name != within and not nested and _is_transformers_model(module) and any(holds(name, n) for n in inside):
            parts.append(name)
    outside = [name for name in inside if not any(holds(part, name) for part in parts)]
    found = {root: held for part in parts for root, held in parts_of(model, inside, part).items()}
    if len(found) < 2 and (outside or not found):
        return {within: inside}
    return found | {within: outside} if outside else found


def text_part(model: nn.Module, names: Iterable[str]) -> str | None:
    """The part of a causal language model that holds its token embedding: not the towers for images or sounds.

    None: another kind of model; or one whose text has no part of its own, as in GIT, or whose text layers also read
    the states of a tower, as in Mllama.
    """
    can_generate, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    if can_generate is None or not can_generate() or getattr(config, "is_encoder_decoder", False):
        return None
    parts, modules = parts_of(model, names), dict(model.named_modules())
    try:
        embedding = cast(Any, model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of a model that does not tell
        return next(iter(parts)) if len(parts) == 1 else None
    at = next((name for name, module in modules.items() if module is embedding), "")
    found = next((root for root in sorted(parts, reverse=True) if holds(root, at)), None)
    if found is None or "cross_attention_states" in inspect.signature(modules[found].forward).parameters:
        return None
    inside = (
        name for name, module in modules.items() if name and holds(found, name) and _is_transformers_model(module)
    )
    towers = [name for name in inside if not holds(name, at) and any(holds(name, n) for n in parts[found])]
    return None if towers else found


def holds(module: str, name: str) -> bool:
    """Whether the module of this name contains the one called `name`; "" is the model itself."""
    return not module or name.startswith(module + ".")


def _is_transformers_model(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)
