"""wheel_smoke.py FILE: the package installed from a wheel or source distribution runs a layer forward and backward."""

import sys

import torch

import smile_kernels as sk
from smile_kernels.testing import Problem, assert_close, expectations

reason = sk.backends("cpu")["cpu"]
if sys.argv[1].endswith(".whl"):  # a source distribution is compiled if there is a compiler
    assert (reason is None) == ("-abi3-" in sys.argv[1]), reason
p = Problem.random(70, 96, 80, 4, 8, 4, 2)
leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
y = sk.functional.smile_linear(*p.arguments(), num_experts_per_tok=2, rank_of_router=4)
dy = torch.randn_like(y)
_, ids = sk.functional.route(p.x.detach(), p.vh.detach(), num_experts_per_tok=2, rank_of_router=4)
expected = expectations(p, ids, dy=dy)
assert_close("y", y, *expected["y"])
for name, gradient in zip(leaves, torch.autograd.grad(y, leaves.values(), dy)):
    assert_close(f"d{name}", gradient, *expected[name])
print(f"{sys.argv[1]}: runs, {reason or 'compiled kernels'}")
