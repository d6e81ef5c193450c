"""The routing step's kernel, compared with loops in float64, and in models with the composition."""

import pytest
import torch

from smile_kernels.ops import library
from smile_kernels.routing import RoutingPolicy, set_routing
from tests.ops.triton.conftest import DEVICE
from tests.routing.definition import POLICIES, by_name, llama, logits, tokens
from tests.routing.test_evidence import CASES, STEPS, TOKEN, check_step


@pytest.fixture(autouse=True)
def _triton(device, monkeypatch):
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "triton")


@STEPS[0]
@STEPS[1]
def test_a_step_follows_the_equations(case, scope):
    check_step(case, scope, torch.float32, DEVICE)


@STEPS[0]
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_in_half_precision(dtype, scope):
    check_step(CASES["prompt"], scope, dtype, DEVICE)


def test_energies_that_overflow_or_are_no_number():
    x = torch.tensor([[1e30, 0.0], [float("nan"), 1.0], [1e-25, 0.0], [0.0, 0.0]], device=DEVICE).view(1, 4, 2)
    router = torch.eye(2, device=DEVICE)[:, None].contiguous()
    _, ids, evidence, sums = library.evidence(x, router, None, None, None, None, None, 1, 1, 1, TOKEN, False)
    assert bool(evidence.isfinite().all())
    assert sums[0, 0].tolist() == [1.0, 0.0]
    assert sums[0, 1].tolist() == [0.0, 0.0], "both products of a row with NaN are NaN"
    assert ids[0, :, 0].tolist() == [0, 0, 0, 0]


@by_name(
    {name: POLICIES[name] for name in ("layers", "sequence+layers, m 2", "causal+layers, half-life 3")}
    | {"prompt": RoutingPolicy("prompt", restart_at=(7,))}
)
def test_a_model_follows_the_same_policy(policy, monkeypatch):
    model, ids = llama().to(DEVICE), tokens(3, 7).to(DEVICE)
    set_routing(model, policy)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 7], device=DEVICE)
    kernels = logits(model, input_ids=ids, attention_mask=mask)
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "torch")
    composed = logits(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(kernels[mask.bool()], composed[mask.bool()], rtol=1e-4, atol=1e-5)


def test_opcheck(device):
    x, router = torch.randn(6, 4, device=device), torch.randn(3, 2, 4, device=device)
    prior, before, below = (torch.rand(*shape, device=device) for shape in ((3,), (2, 3), (2, 3, 3)))
    real, factors = torch.ones(2, 3, dtype=torch.bool, device=device), torch.rand(2, 3, device=device)
    arguments = x, router, prior, real, factors, before, below, 2, 2, 2, 1, True, "triton"
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.smile_kernels.evidence.default, arguments, test_utils=utils)
