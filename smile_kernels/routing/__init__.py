"""Routing policies: experts chosen by the evidence of a whole sequence and of the layers below.

In the published method each token at each layer chooses alone, from one noisy score. A `RoutingPolicy` pools the very
same score over tokens and adds up its logarithm over layers; nothing is trained. `policy.py` has the equations,
`control.py` puts a policy on a model, `state.py` follows one forward pass, `tokens.py` reads padding and packing,
`cache.py` keeps what generation needs beside a KV cache, `calibration.py` finds what is constant in the scores.
"""

from .calibration import CalibrationReport, calibrate, check_calibration
from .control import check_routing, get_routing, set_routing, watch_routing
from .override import routing_override
from .policy import RoutingPolicy
from .tokens import user_turn_ids

__all__ = [
    "CalibrationReport",
    "RoutingPolicy",
    "calibrate",
    "check_calibration",
    "check_routing",
    "get_routing",
    "routing_override",
    "set_routing",
    "user_turn_ids",
    "watch_routing",
]
