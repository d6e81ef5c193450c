"""Compares every path of this machine's backends with the float64 reference, each in a child process.

`smile-kernels doctor --verify` runs it for users, `bench.gpu` before it times anything.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from .functional import smile_linear
from .ops import excluded, library, reference
from .routing.policy import energy_shares, log_evidence, router_energies, running_sums
from .testing import Problem, assert_close, expectations, taking
from .worker import Outcome, Worker, run_all

# Tokens, in_features, out_features, N, r, g, m: sizes that real layers have, odd sizes, and a router wider than r.
_ON_GPU = [
    *((t, 1024, 1536, 8, 32, 16, 1) for t in (1, 16, 64, 2048)),
    *((t, 1000, 1480, 3, 20, 24, 2) for t in (3, 13, 300)),
]
_ON_CPU = [*((t, 96, 80, 4, 8, 4, 1) for t in (1, 16, 70)), *((t, 33, 29, 3, 5, 7, 2) for t in (3, 13))]
# Allowed error as a multiple of plain PyTorch's. Another order of summation accounts for a factor of a few in float32;
# the faults to find (a wrong or unwritten number, TF32 instead of float32) for hundreds.
_SLACK = {torch.float32: 8.0, torch.bfloat16: 4.0, torch.float16: 4.0}


@dataclass(frozen=True)
class Check:
    """One path of one backend in one dtype, and the shape on which it is compared with the reference.

    `shape`: tokens, in_features, out_features, N, r, g, m. `linear` and `apply` are paths of the Triton backend
    (`ops.triton.configs`); "" where there is no choice. `operator`: "" for a layer that routes itself, "given" for one
    with a given routing, "parts" for one of two parts, "evidence" for a step of a routing policy.
    """

    backend: str
    device: str
    dtype: torch.dtype
    training: bool
    shape: tuple[int, ...]
    linear: str = ""
    apply: str = ""
    seed: int = 0
    operator: str = ""

    @property
    def path(self) -> str:
        """The path's name within the backend."""
        return " ".join(filter(None, [self.operator, self.linear, self.apply]))

    @property
    def name(self) -> str:
        """The path and the shape; unique."""
        t, d, o, n, r, g, m = self.shape
        about = f"T{t} {d} to {o} N{n} r{r} g{g} top-{m}"
        return f"{excluded.name_of(self.backend, self.path, self.dtype, self.training)}, {about}"

    @property
    def waits(self) -> bool:
        """Whether its programs wait for each other, so that a fault hangs the GPU."""
        return self.linear == "decode_one_launch"


def triton_paths(device: str, dtype: torch.dtype, tokens: int, n: int, k: int) -> list[tuple[str, str]]:
    """(routing path, apply path) of every way to run the forward of a layer of n experts with k rows."""
    from .ops.triton import configs

    found = configs.device_of(torch.device(device))
    few = [(linear, "fused") for linear in configs.linear_paths(found, dtype, tokens, n, k, False)[:-2]]
    applied = ["fused", *(["tma"] if found.tma and dtype.itemsize == 2 else []), "delta"]
    return [*few, *product(["one_product"], applied), *product(["route_first"], ["fused", "delta", "grouped"])]


def checks(device: str) -> list[Check]:
    """The checks for a device, "cuda" or "cpu"; those that could hang it come last."""
    shapes = _ON_GPU if device == "cuda" else _ON_CPU
    found = []
    for backend, reason in library.backends(device).items():
        if reason is not None:
            continue
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
        for dtype, training in product(dtypes, (False, True)):
            ways = [("", "")]
            if backend == "triton" and training:
                ways = [("one_product", "fused"), ("route_first", "grouped")]
            elif backend == "triton":
                ways = triton_paths(device, dtype, 1, 8, 32)
            # Every second shape for other dtypes and training; large, odd and few-token shapes remain.
            kept = shapes if dtype == torch.bfloat16 and not training else shapes[1::2]
            found += [
                Check(backend, device, dtype, training, shape, linear, apply)
                for (linear, apply), shape in product(ways, kept)
                if not (linear in ("decode", "decode_one_launch") and shape[0] > 16)
            ]
        operators = ["given", "parts", *(["evidence"] if backend != "torch" else [])]
        found += [
            Check(backend, device, dtype, False, shape, operator=operator)
            for operator, dtype, shape in product(operators, dtypes, shapes[1::2])
        ]
    return sorted(found, key=lambda check: check.waits)


def perform(check: Check) -> float:
    """Run a check and return its seconds; raises AssertionError if a result is wrong."""
    start = time.monotonic()
    p = Problem.random(*check.shape, dtype=check.dtype, device=check.device, seed=check.seed)
    kinds = {"given": _check_given, "parts": _check_parts, "evidence": _check_evidence, "": _check_forward}
    (_check_training if check.training else kinds[check.operator])(check, p)
    return round(time.monotonic() - start, 2)


@contextmanager
def taking_path(check: Check) -> Iterator[None]:
    """Run the path of a check in memory initialised with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            if check.linear:
                with taking(check.linear, check.apply):
                    yield
            else:
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _check_forward(check: Check, p: Problem) -> None:
    backend, m = library._implementation(check.backend), p.num_experts_per_tok
    with taking_path(check):
        y, weights, ids, _ = backend.linear(*p.arguments(), m, p.rank_of_router, False)
    check_routing(p, weights, ids)
    assert_close("y", y, *expectations(p, ids)["y"], slack=_SLACK[check.dtype])


def _given(p: Problem, *of_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random routing [T, *of_parts, m], with entries of no expert."""
    generator, device = torch.Generator(p.x.device).manual_seed(1), p.x.device
    shape = (len(p.x), *of_parts, p.num_experts_per_tok)
    weights = torch.rand(shape, generator=generator, device=device)
    return weights, torch.randint(-1, len(p.s), shape, generator=generator, device=device).int()


def _check_given(check: Check, p: Problem) -> None:
    weights, ids = _given(p)
    with taking_path(check):
        y, _ = library._implementation(check.backend).apply(*p.arguments()[:7], weights, ids, False)
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"], slack=_SLACK[check.dtype])


def _check_parts(check: Check, p: Problem) -> None:
    """Two parts of the same input: by a given routing, and by their own routers."""
    other = replace(Problem.random(*check.shape, dtype=check.dtype, device=check.device, seed=check.seed + 1), x=p.x)
    both: list[Any] = list(zip(p.arguments(), other.arguments()))
    layer = [torch.cat(both[1]), torch.cat(both[2]), torch.stack(both[3]), torch.stack(both[4])]
    layer += [torch.cat(both[5], 1), torch.cat(both[6], 1)]
    options: dict[str, Any] = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router}
    options |= {"parts": (len(p.weight),) * 2, "backend": check.backend}
    weights, ids = _given(p, 2)
    with taking_path(check), torch.no_grad():
        given = smile_linear(p.x, *layer, **options, routing=(weights, ids))
        routed = smile_linear(p.x, *layer, **options)
    for part, (one, y, y_of_own) in enumerate(zip((p, other), given.chunk(2, -1), routed.chunk(2, -1))):
        want = expectations(one, ids[:, part], weights=weights[:, part])["y"]
        assert_close(f"y of part {part}, given its routing", y, *want, slack=_SLACK[check.dtype])
        _, own = reference.route(one.x.double(), one.rows().double(), one.num_experts_per_tok)
        assert_close(f"y of part {part}", y_of_own, *expectations(one, own)["y"], slack=_SLACK[check.dtype])


def _check_evidence(check: Check, p: Problem) -> None:
    """A step of each scope with all of a policy's state, and the compiled operator that computes the layer, too."""
    generator, device = torch.Generator(p.x.device).manual_seed(1), p.x.device
    sequences, m, n = 2 if len(p.x) % 2 == 0 else 1, p.num_experts_per_tok, len(p.s)
    tokens = len(p.x) // sequences

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    compiled = None if check.backend == "triton" else torch.ops.smile_kernels_ext
    step = library._implementation(check.backend).evidence if compiled is None else compiled.evidence.default
    for scope in range(4 if check.backend == "cpu" else 3):
        state = random(n), random(sequences, tokens) > 0.3, random(1, tokens)
        before, below = random(sequences, n) if scope == 1 else None, random(sequences, 1 if scope == 2 else tokens, n)
        options = m, p.rank_of_router, sequences, scope, True
        with taking_path(check):
            weights, ids, logs, sums = step(p.x, p.vh, *state, before, below, *options)
        _check_step(p, *state, before, below, scope, weights, ids, logs, sums)
        if compiled is None:
            continue
        kept = None if before is None else torch.cat([before[:, None], torch.zeros_like(sums)], 1)
        with taking_path(check):
            y, _, same, _ = compiled.evidence_linear.default(*p.arguments(), *state, kept, 1, below, *options)
        assert torch.equal(same, ids), "ids: differ between a step and a step with its layer"
        assert kept is None or torch.equal(kept[:, 1:], sums), "sums: differ between a step and a step with its layer"
        chosen, by = (t.expand(sequences, tokens, m).reshape(-1, m) for t in (ids, weights))
        assert_close("y", y, *expectations(p, chosen, weights=by)["y"], slack=_SLACK[check.dtype])


def _check_step(p, prior, real, factors, before, below, scope, weights, ids, logs, sums) -> None:
    """Compare a policy's step with the equations of `routing.policy` in float64."""

    def expected_sums(dtype):
        shares = energy_shares(router_energies(p.x.to(dtype), p.rows().to(dtype))).view(*real.shape, -1)
        shares = torch.where(real[..., None], shares, 0)
        if scope == 1:
            return running_sums(shares, factors, before.to(shares.dtype))
        if scope == 3:  # a window of one token to each side
            return F.pad(shares, (0, 0, 1, 1)).unfold(1, 3, 1).sum(-1)
        return (shares * factors[..., None]).sum(1, keepdim=True) if scope == 2 else shares

    def expected_logs(dtype):  # from its own sums, since the logarithm of a small share amplifies rounding
        found = log_evidence(sums.to(dtype), True, prior.to(dtype)) + below.to(dtype)
        return found - found.amax(-1, keepdim=True)

    def compare(name, got, expected, plain):
        want = expected(torch.float64)
        assert_close(name, got, want, (expected(plain) - want).abs().max().item(), _SLACK[torch.float32])

    compare("sums", sums, expected_sums, p.x.dtype)
    compare("evidence", logs, expected_logs, sums.dtype)
    best, order = (t[..., : ids.shape[-1]] for t in logs.sort(dim=-1, descending=True, stable=True))
    assert torch.equal(ids.long(), order), "ids: are not those of the largest evidence"
    assert_close("weights", weights, best.double().softmax(-1), torch.finfo(weights.dtype).eps, _SLACK[torch.float32])


def check_routing(p: Problem, weights: torch.Tensor, ids: torch.Tensor) -> None:
    """Check that the chosen experts are the m best, up to rounding of the scores, and the weights their softmax."""
    n, m = p.s.shape[0], p.num_experts_per_tok
    assert ((ids >= 0) & (ids < n)).all(), f"ids: are {ids.min()} to {ids.max()}; expected 0 to {n - 1}"
    scores = reference.scores(p.x.double(), p.rows().double())
    best = scores.sort(-1, descending=True).values[:, :m]
    chosen = scores.gather(1, ids.long())
    error = ((best - chosen).abs() / best).max().item()
    assert error <= 1e-5, f"ids: an expert was chosen whose score is {error:.1%} below the best"
    error = (weights.double() - chosen.softmax(-1)).abs().max().item()
    assert error <= 1e-4, f"weights: are off by {error:.3g}; expected at most 1e-4"


def _check_training(check: Check, p: Problem) -> None:
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in p.tensors().items()}
    p = replace(p, **leaves)
    _, ids = reference.route(p.x.detach().double(), p.rows().detach().double(), p.num_experts_per_tok)
    options: dict[str, Any] = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router}
    generator = torch.Generator(check.device).manual_seed(0)
    with taking_path(check):
        y = smile_linear(*p.arguments(), **options, backend=check.backend)
        dy = torch.randn(y.shape, generator=generator, device=check.device).to(check.dtype)
        got = dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), dy)))
    want = expectations(p, ids, dy=dy)
    assert_close("y", y.detach(), *want["y"], slack=_SLACK[check.dtype])
    for name, gradient in got.items():
        assert_close(f"d{name}", gradient, *want[name], slack=_SLACK[check.dtype])


def verify(
    todo: Sequence[Check],
    workers: Sequence[Worker],
    *,
    seconds: float = 120.0,
    deadline: float = float("inf"),
    report: Callable[[Check, Outcome], None] = lambda *_: None,
) -> dict[str, Outcome]:
    """Run checks in child processes: name -> outcome (seconds, or the reason of the failure).

    Args:
        todo: the result of `checks`, or a part of it.
        workers: the processes, which run `perform`. Checks that may hang the GPU come last, one at a time.
        seconds: time limit for a check, after which it counts as hung.
        deadline: value of `time.monotonic` after which no check starts; checks that did not start have no outcome.
        report: called with each finished check.
    """
    outcomes: dict[str, Outcome] = {}

    def ended(check: Check, outcome: Outcome) -> None:
        outcomes[check.name] = outcome
        report(check, outcome)

    safe, waiting = ([check for check in todo if check.waits == waits] for waits in (False, True))
    run_all(workers, safe, seconds=seconds, deadline=deadline, report=ended)
    run_all(workers[:1], waiting, seconds=seconds, deadline=deadline, report=ended)
    return outcomes


def blamed(todo: Sequence[Check], outcomes: dict[str, Outcome]) -> dict[str, str]:
    """Excluded path -> reason, for `excluded.record`.

    A failed check excludes the parts (routing path, apply path) that no passed check of the same dtype and pass has
    used; if each part has passed in another combination, the apply path. A failed step of a policy excludes that
    operator, which PyTorch's operators replace. The whole backend is excluded if it has no such parts, if its training
    or another operator failed, or if "route_first" failed, the only path for a given routing.
    """
    failures: dict[Check, str | None] = {}  # path (a check without a shape) -> its first failure
    for check in todo:
        if check.name in outcomes:
            path = replace(check, shape=(), seed=0)
            failures[path] = failures.get(path) or outcomes[check.name].failure
    passed = {
        (path.backend, path.dtype, path.training, part)
        for path, failure in failures.items()
        if failure is None
        for part in (path.linear, path.apply)
    }
    reasons: dict[str, str] = {}
    for path, failure in failures.items():
        if failure is None:
            continue
        parts = [path.linear] if path.linear in ("decode", "decode_one_launch") else [path.linear, path.apply]
        at_fault = [part for part in parts if (path.backend, path.dtype, path.training, part) not in passed]
        if path.operator:
            at_fault = ["evidence" if path.operator == "evidence" else ""]
        for part in [""] if path.training or {"", "route_first"} & {*at_fault} else at_fault or [path.apply]:
            name = excluded.name_of(path.backend, part, path.dtype, path.training)
            reasons.setdefault(name, failure.splitlines()[0][:300])
    return reasons


def as_record(check: Check, outcome: Outcome) -> dict[str, object]:
    """A check and its outcome as values for JSON."""
    found = {**asdict(check), "dtype": str(check.dtype).removeprefix("torch."), "shape": list(check.shape)}
    return {"name": check.name, **found, "seconds": outcome.result, "failure": outcome.failure}
