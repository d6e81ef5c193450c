"""SMILE checkpoints in vLLM: `vllm serve directory`. vLLM finds `register` through its entry points."""

from vllm.model_executor.layers.quantization import register_quantization_config

from ...config import QUANT_METHOD
from ...versions import warn_if_newer
from .linear import SmileQuantizationConfig


def register() -> None:
    """Register SMILE checkpoints with vLLM; called by vLLM in each of its processes."""
    warn_if_newer("vllm")
    register_quantization_config(QUANT_METHOD)(SmileQuantizationConfig)
