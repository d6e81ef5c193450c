"""Routing policies: experts are chosen by the evidence of a whole sequence and of previous layers.

In the published method each token at each layer uses only its own, noisy score. A `RoutingPolicy` pools the same score
over tokens and sums its logarithm over layers, without training. `policy.py` has the equations, `parts.py` finds the
modules that have tokens of their own, `control.py` sets a policy on a model, `state.py` is the state of a forward pass,
`tokens.py` reads padding and packing, `cache.py` stores the state for KV caches, `calibration.py` measures the constant
part of the scores.
"""

from .calibration import CalibrationReport, calibrate, check_calibration
from .control import check_kept, check_order, check_routing, get_routing, set_routing, watch_routing
from .override import routing_override
from .policy import RoutingPolicy
from .tokens import user_turn_ids

__all__ = [
    "CalibrationReport",
    "RoutingPolicy",
    "calibrate",
    "check_calibration",
    "check_kept",
    "check_order",
    "check_routing",
    "get_routing",
    "routing_override",
    "set_routing",
    "user_turn_ids",
    "watch_routing",
]
