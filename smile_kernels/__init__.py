"""Custom GPU kernels for SMILE layers: sparse mixtures of low-rank experts at close to the cost of the plain layer.

`import smile_kernels` imports neither Triton nor the compiled extension; each is loaded by the first call that uses it.
"""

from . import functional, integrations
from .nn import SmileLinear
from .ops.library import backends

__version__ = "0.1.0"
__all__ = ["SmileLinear", "backends", "functional"]

integrations.register_with_transformers()
