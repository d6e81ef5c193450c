"""A model and its fine-tuned versions -> a model of SMILE layers: in memory, or from disk to disk."""

from .disk import upscale_checkpoints
from .experts import add_expert, remove_expert, replace_expert
from .memory import upscale
from .report import LayerReport, LostChange, UpscaleReport
from .verify import ExpertVerdict, verify

__all__ = [
    "ExpertVerdict",
    "LayerReport",
    "LostChange",
    "UpscaleReport",
    "add_expert",
    "remove_expert",
    "replace_expert",
    "upscale",
    "upscale_checkpoints",
    "verify",
]
