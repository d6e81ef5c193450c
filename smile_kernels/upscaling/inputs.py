"""Random inputs for transformers models, from their configs."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import SmileError

__all__ = ["example_inputs"]


def example_inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a transformers model: ids, pixels, waves or features, according to its config.

    Raises:
        ValueError: the model has no config, or takes other inputs.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise SmileError(f"inputs: {type(model).__name__} has no config to derive them from; expected inputs={{...}}")
    generator = torch.Generator().manual_seed(seed)
    dtype, device = next((p.dtype, p.device) for p in model.parameters())
    parts = [config, *(getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name))]

    def setting(*names: str, default: int) -> int:
        found = (getattr(part, name, None) for part in parts for name in names)
        value = next((one for one in found if one), default)
        return value[0] if isinstance(value, (list, tuple)) else value

    def ids(length: int = 8) -> Tensor:
        return torch.randint(3, min(setting("vocab_size", default=96), 1000) - 2, (2, length), generator=generator)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bins = setting("num_mel_bins", "input_feat_per_channel", default=80)
    side, channels = setting("image_size", default=32), setting("num_channels", default=3)
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": ids,
        "pixel_values": lambda: random(2, channels, side, side),
        "input_values": lambda: random(2, 6000),
        "input_features": lambda: random(2, bins, 2 * setting("max_source_positions", default=50)),
        "decoder_input_ids": lambda: ids(4),
    }
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main] + (["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else [])
    if "pixel_values" in parameters and "input_ids" in parameters and not hasattr(config, "image_token_id"):
        wanted += ["pixel_values"]  # a model of images and texts
    unknown = [name for name in wanted if name not in makers or name not in parameters]
    if unknown:
        raise SmileError(f"inputs: {type(model).__name__} takes {unknown[0]!r}; expected it in inputs={{...}}")
    return {name: makers[name]().to(device) for name in dict.fromkeys(wanted)}
