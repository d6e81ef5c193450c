"""wheel_smoke.py WHEEL: the installed package runs a layer forward and backward, on the backend of its wheel."""

import sys

import torch

import smile_kernels as sk
from smile_kernels.testing import Problem, assert_close, expectations

compiled = "-abi3-" in sys.argv[1]
reason = sk.backends("cpu")["cpu"]
assert (reason is None) == compiled, reason
p = Problem.random(70, 96, 80, 4, 8, 4, 2)
leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
y = sk.functional.smile_linear(*p.arguments(), num_experts_per_tok=2, rank_of_router=4)
dy = torch.randn_like(y)
_, ids = sk.functional.route(p.x.detach(), p.vh.detach(), num_experts_per_tok=2, rank_of_router=4)
expected = expectations(p, ids, dy=dy)
assert_close("y", y, *expected["y"])
for name, gradient in zip(leaves, torch.autograd.grad(y, leaves.values(), dy)):
    assert_close(f"d{name}", gradient, *expected[name])
print(f"{sys.argv[1]}: runs, {'compiled kernels' if compiled else reason}")
