"""A model and its fine-tuned versions -> a model of SMILE layers: in memory, or from disk to disk."""

from .disk import upscale_checkpoints
from .memory import upscale
from .report import LayerReport, UpscaleReport

__all__ = ["LayerReport", "UpscaleReport", "upscale", "upscale_checkpoints"]
