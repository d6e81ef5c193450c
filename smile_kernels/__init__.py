"""SMILE for PyTorch: a base model and its fine-tuned versions as one sparse mixture of low-rank experts.

`import smile_kernels` imports neither Triton nor the compiled extension; each is loaded by the first call that uses it.
"""

__version__ = "0.1.0"

from . import analysis, functional, integrations
from .checkpoint import calibrate_checkpoint, load_pretrained, save_pretrained
from .errors import SmileError
from .integrations.arrow import from_peft_arrow
from .integrations.fusion_bench import from_fusion_bench
from .nn import SmileLinear, warmup
from .ops.library import backends
from .routing import (
    RoutingPolicy,
    calibrate,
    get_routing,
    routing_override,
    set_routing,
    user_turn_ids,
    watch_routing,
)
from .sweeping import sweep
from .upscaling import add_expert, remove_expert, replace_expert, upscale, upscale_checkpoints, verify

__all__ = [
    "RoutingPolicy",
    "SmileError",
    "SmileLinear",
    "add_expert",
    "analysis",
    "backends",
    "calibrate",
    "calibrate_checkpoint",
    "from_fusion_bench",
    "from_peft_arrow",
    "functional",
    "get_routing",
    "load_pretrained",
    "remove_expert",
    "replace_expert",
    "routing_override",
    "save_pretrained",
    "set_routing",
    "sweep",
    "upscale",
    "upscale_checkpoints",
    "user_turn_ids",
    "verify",
    "warmup",
    "watch_routing",
]

integrations.register_with_transformers()
