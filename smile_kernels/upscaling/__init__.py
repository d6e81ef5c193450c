"""Upscaling: a model and its fine-tuned versions become a model of SMILE layers, in memory or on disk."""

from .disk import upscale_checkpoints
from .experts import add_expert, remove_expert, replace_expert
from .memory import upscale
from .report import LayerReport, LostChange, LostFile, LostSetting, UpscaleReport
from .verify import ExpertVerdict, verify

__all__ = [
    "ExpertVerdict",
    "LayerReport",
    "LostChange",
    "LostFile",
    "LostSetting",
    "UpscaleReport",
    "add_expert",
    "remove_expert",
    "replace_expert",
    "upscale",
    "upscale_checkpoints",
    "verify",
]
