"""The operator `evidence`, one step of a policy, compared with loops in float64 and with the composition."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from smile_kernels import SmileLinear
from smile_kernels.ops import extension, library
from smile_kernels.routing import RoutingPolicy, set_routing
from smile_kernels.routing.policy import energy_shares, log_evidence, router_energies, running_sums
from smile_kernels.testing import Problem, assert_close
from tests.routing.definition import POLICIES, SIZES, by_name, llama, logits, tokens

pytestmark = pytest.mark.skipif(extension.unavailable("cpu") is not None, reason="needs the CPU extension")

TOKEN, CAUSAL, SEQUENCE = range(3)
TINY = 1e-30


def sums_of(x, rows, real, factors, before, scope):
    """S [B, R, N] by the equations of routing/policy.py, number by number."""
    batch, length, n = *x.shape[:2], len(rows)
    sums = torch.zeros(batch, 1 if scope == SEQUENCE else length, n, dtype=torch.float64)
    if scope > SEQUENCE:  # a window of scope - 2 tokens to each side
        shares, width = sums_of(x, rows, real, None, None, TOKEN), scope - SEQUENCE
        for b, t in itertools.product(range(batch), range(length)):
            sums[b, t] = sum(shares[b, s] for s in range(length) if abs(s - t) <= width)
        return sums
    for b in range(batch):
        total = [0.0] * n if before is None else before[b].tolist()
        for t in range(length):
            energies = [float((rows[i].double() @ x[b, t].double()).square().sum()) for i in range(n)]
            energies = [e if real is None or real[b, t] else 0.0 for e in energies]
            share = [max(e / sum(energies), TINY) if e > 0 else 0.0 for e in energies]
            factor = 1.0 if factors is None else float(factors.expand(batch, length)[b, t])
            for i in range(n):
                total[i] = {
                    TOKEN: share[i],
                    CAUSAL: factor * total[i] + share[i],
                    SEQUENCE: total[i] + factor * share[i],
                }[scope]
            sums[b, t if scope != SEQUENCE else 0] = torch.tensor(total, dtype=torch.float64)
    return sums


def evidence_of(sums, prior, below, accumulates):
    """L [B, R, N] of sums, number by number."""
    evidence = torch.zeros(sums.shape, dtype=torch.float64)
    for b, row in itertools.product(*map(range, sums.shape[:2])):
        values = sums[b, row].tolist()
        priors = [0.0] * len(values) if prior is None else prior.tolist()
        logs = [math.log(max(value, TINY)) - constant for value, constant in zip(values, priors)]
        if accumulates:
            present = [log for log, value in zip(logs, values) if value > 0]
            mean = sum(present) / len(present) if present else 0.0
            logs = [log if value > 0 else mean for log, value in zip(logs, values)]
        if below is not None:
            logs = [log + float(other) for log, other in zip(logs, below[b, row])]
            logs = [log - max(logs) for log in logs]
        evidence[b, row] = torch.tensor(logs, dtype=torch.float64)
    return evidence


def composed_sums(x, rows, real, factors, before, scope):
    """S by plain PyTorch in x's own precision."""
    shares = energy_shares(router_energies(x, rows))
    shares = shares if real is None else torch.where(real[..., None], shares, 0)
    if scope == CAUSAL:
        return running_sums(shares, factors, before)
    if scope > SEQUENCE:
        width = min(scope - SEQUENCE, shares.shape[1])
        return F.pad(shares, (0, 0, width, width)).unfold(1, 2 * width + 1, 1).sum(-1)
    shares = shares if factors is None or scope == TOKEN else shares * factors[..., None].to(shares.dtype)
    return shares.sum(1, keepdim=True) if scope == SEQUENCE else shares


CASES = {  # batch, tokens, D, N, g, m: one token, primes, more tokens than a panel, many experts
    "one": (1, 1, 1, 1, 1, 1),
    "decode": (3, 1, 37, 5, 3, 2),
    "prompt": (2, 29, 45, 6, 4, 1),
    "long": (1, 131, 64, 3, 2, 3),
    "experts": (5, 7, 33, 67, 1, 4),
}


WINDOWS = pytest.mark.parametrize("scope", [TOKEN, CAUSAL, SEQUENCE, SEQUENCE + 1, SEQUENCE + 9])  # on a CPU
STEPS = [
    pytest.mark.parametrize("scope", [TOKEN, CAUSAL, SEQUENCE]),
    pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys()),
]


def check_step(case, scope, dtype, device="cpu", step=library.evidence):
    batch, length, d, n, g, m = case
    real_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for given in (False, True):
        p = Problem.random(batch * length, d, 8, n, 1, g, dtype=dtype, seed=int(torch.randint(2**31, ())))
        x = p.x.view(batch, length, d)
        x[0, 0] = 0  # no evidence
        if n > 2:
            p.vh[1] = 0  # an expert that did not change the layer
        kept = 1 if scope == SEQUENCE else length
        prior, real, factors, before, below = None, None, None, None, None
        if given:
            prior, before = torch.randn(n, dtype=real_dtype), torch.rand(batch, n, dtype=real_dtype)
            before = before if scope == CAUSAL else None
            below = torch.randn(batch, kept, n, dtype=real_dtype)
            real = torch.rand(batch, length) > 0.3
            factors = torch.rand(batch if length > 1 else 1, length)
        options = (prior, real, factors, before, below)
        there = [t if t is None else t.to(device) for t in options]
        got = step(x.to(device), p.vh.to(device), *there, m, g, batch, scope, given)
        got = [t.cpu() for t in got]
        assert all(t.dtype == real_dtype for t in (got[0], *got[2:]))
        inputs = x, p.vh[:, :g], real, factors, before, scope
        want = sums_of(*inputs)
        assert_close("sums", got[3], want, (composed_sums(*inputs) - want).abs().max())
        # From its own sums, since the logarithm of a small share amplifies rounding.
        want = evidence_of(got[3], prior, below, given)
        plain = log_evidence(got[3], given, prior)
        plain = plain if below is None else (plain + below) - (plain + below).amax(-1, keepdim=True)
        assert_close("evidence", got[2], want, (plain - want).abs().max())
        # The choice is exactly that of its own evidence, since rounding determines it if experts are nearly equal.
        best, ids = got[2].sort(dim=-1, descending=True, stable=True)
        assert torch.equal(got[1].long(), ids[..., :m])
        torch.testing.assert_close(got[0], best[..., :m].softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@WINDOWS
@STEPS[1]
def test_a_step_follows_the_equations(case, scope, dtype):
    check_step(case, scope, dtype)


def check_step_with_layer(case, scope, dtype, ops):
    """`evidence_linear` has the bits of `evidence` and `apply`; it continues the sums in their place, and no other."""
    batch, length, d, n, g, m = case
    real_dtype, past = torch.float64 if dtype == torch.float64 else torch.float32, 2
    for given, router in itertools.product((False, True), repeat=2):
        p = Problem.random(batch * length, d, 11, n, min(d, 3), g, m, dtype=dtype, router=router, bias=given)
        prior, real, factors, before, below, sums = [None] * 6
        if given:
            prior, real = torch.randn(n, dtype=real_dtype), torch.rand(batch, length) > 0.3
            rows = 1 if scope == SEQUENCE else length
            factors, below = torch.rand(1, length), torch.randn(batch, rows, n, dtype=real_dtype)
        if given and scope == CAUSAL:
            sums = torch.full((batch, past + length + 1, n), math.nan, dtype=real_dtype)
            before = sums[:, past - 1] = torch.rand(batch, n, dtype=real_dtype)
        untouched = None if sums is None else sums.clone()
        x, weight, bias, vh, s, u, expert_bias, rows = p.arguments()
        options = m, g, batch, scope, given
        at = 0 if sums is None else past
        got = ops.evidence_linear(*p.arguments(), prior, real, factors, sums, at, below, *options)
        want = ops.evidence(x, vh if rows is None else rows, prior, real, factors, before, below, *options)
        of_tokens = (t.expand(batch, length, m).reshape(-1, m) for t in want[:2])
        y, _ = ops.apply(x, weight, bias, vh, s, u, expert_bias, *of_tokens, False)
        for one, other in zip(got, (y, *want[:3])):
            assert torch.equal(one, other)
        if sums is not None:
            untouched[:, past : past + length] = want[3]
            assert torch.equal(sums.nan_to_num(-1), untouched.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@WINDOWS
@STEPS[1]
def test_a_step_with_its_layer_is_both(case, scope, dtype):
    ext = torch.ops.smile_kernels_ext
    check_step_with_layer(case, scope, dtype, SimpleNamespace(**{n: getattr(ext, n).default for n in WITH_LAYER}))


WITH_LAYER = ("evidence", "apply", "evidence_linear")


@pytest.mark.parametrize("name", ["causal", "causal + layers", "token + layers", "sequence", "sequence + layers"])
def test_inference_by_one_operator_is_that_of_two(name, monkeypatch):
    """Generation with padding, a lock and growing caches; with gradients each layer's choice and product are apart."""
    scope, _, layers = name.partition(" + ")
    calls = []
    one = library.serve_step
    monkeypatch.setattr(library, "serve_step", lambda *args: calls.append(0) or one(*args))
    for lock, half_life in ((None, None), (1, 2)):
        model, ids = llama(), tokens(3, 9)
        set_routing(model, RoutingPolicy(scope, bool(layers), lock, half_life=half_life if scope != "token" else None))
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, :4] = 0
        results = []
        for training in (False, True):
            cache, given = DynamicCache(config=model.config), len(calls)
            with torch.set_grad_enabled(training):
                for begin, end in ((0, 5), (5, 6), (6, 9)):
                    out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            results.append(out.logits.detach())
            assert (len(calls) > given) != training
        assert torch.equal(*results)


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = SmileLinear(8, 8, 3, 2, 2), SmileLinear(8, 8, 3, 2, 2)

    def forward(self, inputs_embeds):
        return self.b(self.a(inputs_embeds))


@torch.no_grad()
@pytest.mark.parametrize("scope", [None, "token", "causal", "sequence"])
def test_inference_under_vmap_autocast_and_without_data(scope):
    model, x = TwoLayers().eval(), torch.randn(4, 2, 5, 8)
    if scope is not None:
        set_routing(model, RoutingPolicy(scope, accumulate=True))
    want = torch.stack([model(inputs_embeds=one) for one in x])
    torch.testing.assert_close(torch.vmap(lambda one: model(inputs_embeds=one))(x), want)
    for use_cache in (False, True) if scope is not None else ():
        lm, embedded = llama(), torch.randn(3, 2, 5, SIZES["hidden_size"])
        set_routing(lm, RoutingPolicy(scope, accumulate=True))
        call = functools.partial(logits, lm, use_cache=use_cache)
        each = torch.stack([call(inputs_embeds=one) for one in embedded])
        mapped = torch.vmap(lambda one, call=call: call(inputs_embeds=one))(embedded)
        torch.testing.assert_close(mapped, each, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs_embeds=x[0]).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(inputs_embeds=mode.from_tensor(x[0])).shape == want[0].shape
    model = model.to("meta")
    assert model(inputs_embeds=x[0].to("meta")).shape == want[0].shape


def test_energies_that_overflow_or_are_no_number():
    x = torch.tensor([[1e30, 0.0], [float("nan"), 1.0], [1e-25, 0.0], [0.0, 0.0]]).view(1, 4, 2)
    router = torch.eye(2)[:, None].contiguous()
    _, ids, evidence, sums = library.evidence(x, router, None, None, None, None, None, 1, 1, 1, TOKEN, False)
    assert bool(evidence.isfinite().all())
    assert sums[0, 0].tolist() == [1.0, 0.0]
    assert sums[0, 1].tolist() == [0.0, 0.0], "both products of a row with NaN are NaN"
    assert ids[0, :, 0].tolist() == [0, 0, 0, 0]


def test_bad_arguments_are_named():
    x, router = torch.randn(6, 4), torch.randn(3, 2, 4)

    def call(prior=None, real=None, factors=None, before=None, below=None, m=1, g=2, batch=2, scope=CAUSAL, x=x):
        return library.evidence(x, router, prior, real, factors, before, below, m, g, batch, scope, True)

    for wrong, says in (
        ({"prior": torch.zeros(2)}, "prior: has shape"),
        ({"prior": torch.zeros(3).double()}, "prior: has another dtype"),
        ({"real": torch.ones(2, 2, dtype=torch.bool)}, "real: has shape"),
        ({"factors": torch.ones(2, 2)}, "factors: expected"),
        ({"factors": torch.ones(2, 3).double()}, "factors: expected"),
        ({"before": torch.zeros(1, 3)}, "before: has shape"),
        ({"below": torch.zeros(2, 1, 3)}, "below: has shape"),
        ({"m": 4}, "num_experts_per_tok: is 4"),
        ({"g": 3}, "router: has 3"),
        ({"batch": 4}, "sequences: is 4"),
        ({"scope": -1}, "scope: is -1"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call(**wrong)
    with pytest.raises(ValueError, match=r"^router: has shape \[3, 2, 4\]; expected \[N, g, 5\]"):
        call(x=torch.randn(6, 5))


@by_name(
    POLICIES | {"prompt": RoutingPolicy("prompt", restart_at=(7,)), "half-life": RoutingPolicy("sequence", half_life=2)}
)
def test_the_composition_follows_the_same_policy(policy, monkeypatch):
    """Plain PyTorch, as used on other devices."""
    model, ids = llama(), tokens(3, 7)
    set_routing(model, policy)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 7])
    compiled = logits(model, input_ids=ids, attention_mask=mask)
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "torch")
    assert library.evidence(torch.randn(1, 1, 4), torch.randn(2, 1, 4), *[None] * 5, 1, 1, 1, TOKEN, True) is None
    composed = logits(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(compiled[mask.bool()], composed[mask.bool()], rtol=1e-4, atol=1e-5)


def test_opcheck():
    x, router = torch.randn(6, 4), torch.randn(3, 2, 4)
    options = (torch.zeros(3), torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 3), torch.rand(2, 3))
    library.evidence(x, router, *[None] * 5, 1, 2, 2, TOKEN, True)  # loads the library
    for scope, rows in ((CAUSAL, 3), (SEQUENCE, 1)):
        arguments = (x, router, *options, torch.randn(2, rows, 3), 2, 2, 2, scope, True)
        utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.smile_kernels_ext.evidence.default, arguments, test_utils=utils)
