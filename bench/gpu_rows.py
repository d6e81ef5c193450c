"""The rows that `bench.gpu` measures on the GPU: one row per job, in a process that may crash or hang.

Each path is compared with the float64 reference before it is timed. Paths that are wrong or cannot run are named.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from smile_kernels.benchmark.measure import Record, graphed, interleave, limits, machine
from smile_kernels.benchmark.peers import BASELINE, PEERS, CannotRunError
from smile_kernels.benchmark.problems import Case, Setting
from smile_kernels.functional import smile_linear
from smile_kernels.ops import reference
from smile_kernels.ops.triton import backend, configs
from smile_kernels.selftest import Check, checks, perform, triton_paths
from smile_kernels.testing import Problem, assert_close, expectations, taking

DTYPE = torch.bfloat16
# Copies of a layer are used in turn, so that its weights are read from memory and not from the L2 cache.
ROTATED_BYTES = 200e6
CALLS = 20  # in one graph, or in one sample
CHECKED_TOKENS = 128  # rows compared number by number; the others by the norm of the difference
NORM = 1e-2  # largest relative error in bfloat16 of all rows together
PEERS_BESIDE = ("expert loop", "fusion_bench")


@dataclass(frozen=True)
class Row:
    """One row.

    `mode`: "graph", "eager", "kernels" (time of each kernel) or "training". `prepare`: compile and check only.
    `skip`: paths that failed and are left out. `only`: the calls to make, by default all.
    """

    layer: str
    setting: Setting
    tokens: int
    mode: str
    device: str
    prepare: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    seconds: float = 0.05

    @property
    def name(self) -> str:
        return f"{self.layer} {self.setting} T{self.tokens} {self.mode}" + (f" {self.only[-1]}" if self.only else "")

    @property
    def case(self) -> Case:
        return Case(self.layer, self.setting, self.tokens, DTYPE)


@functools.lru_cache(maxsize=4)
def _copies(layer: str, setting: Setting, most_tokens: int, device: str) -> list[Problem]:
    """A layer with a long batch, of which rows use a part, and copies of its parameters."""
    first = Case(layer, setting, most_tokens, DTYPE).problem(device)
    count = max(2, -(-int(ROTATED_BYTES) // (first.weight.numel() * first.weight.itemsize))) if device == "cuda" else 2
    tensors: dict[str, Any] = first.tensors()
    tensors.pop("x")
    return [first, *(replace(first, **{name: t.clone() for name, t in tensors.items()}) for _ in range(count - 1))]


def problems(row: Row) -> list[Problem]:
    most = 1 << max(13 if row.device == "cuda" else 0, (row.tokens - 1).bit_length())
    copies = _copies(row.layer, row.setting, most, row.device)
    x = copies[0].x[: row.tokens].contiguous()
    return [replace(p, x=x) for p in copies]


Call = Callable[[Problem], Any]


def _forward_calls(row: Row, copies: list[Problem]) -> tuple[dict[str, Call], dict[str, str]]:
    """Name -> a call on one copy; name -> why it cannot run."""
    m, g = row.setting.num_experts_per_tok, row.setting.rank_of_router
    calls: dict[str, Call] = {
        "chosen": lambda p: smile_linear(*p.arguments(), num_experts_per_tok=m, rank_of_router=g, backend="triton")
    }

    def by(linear: str, apply: str) -> Call:
        def run(p: Problem) -> Any:
            with taking(linear, apply):
                return backend.linear(*p.arguments(), m, g, False)[0]

        return run

    if row.mode != "eager":
        n, r = row.setting.num_local_experts, row.setting.rank_of_expert
        for linear, apply in triton_paths(row.device, DTYPE, row.tokens, n, max(r, g)):
            few = row.device == "cuda" and row.tokens <= 64  # where these two are never the fastest
            # Programs of the single launch wait for one another: only a row of its own takes it.
            if not (few and apply in ("delta", "grouped")) and (linear != "decode_one_launch" or row.only):
                calls[f"{linear} {apply}"] = by(linear, apply)
    peers = ["smile:cuda"]
    if row.mode == "eager" and (row.tokens <= 64 or row.tokens == 2048):
        peers += PEERS_BESIDE
    weights, ids = reference.route(copies[0].x, copies[0].rows(), m)
    cannot = {name: "it failed before" for name in row.skip}
    for name in peers:
        try:
            built = {id(p): PEERS[name].build(p, weights, ids)[0] for p in copies}
            calls[name] = lambda p, built=built: built[id(p)](p.x)
        except CannotRunError as reason:
            cannot[name] = str(reason)
        except Exception as error:  # the exception is the reason why a peer cannot run
            cannot[name] = f"raised {type(error).__name__}: {error}"[:500]
    wanted = calls if row.only is None else row.only
    return {name: call for name, call in calls.items() if name in wanted and name not in row.skip}, cannot


def _check(row: Row, copies: list[Problem], calls: dict[str, Call]) -> dict[str, str]:
    """Compare every call's result with the reference, and remove the wrong ones from `calls`: name -> the error."""
    p, m = copies[0], row.setting.num_experts_per_tok
    _, ids = reference.route(p.x.double(), p.rows().double(), m)
    rows = torch.linspace(0, row.tokens - 1, min(row.tokens, CHECKED_TOKENS), device=p.x.device).long()
    want, plain_error = expectations(replace(p, x=p.x[rows]), ids[rows])["y"]
    weights = reference.scores(p.x.double(), p.rows().double()).gather(1, ids.long()).softmax(-1)
    every = reference.apply(*p.to(torch.float64).arguments()[:7], weights, ids)
    wrong = {}
    for name, call in list(calls.items()):
        try:
            y = call(p)
            assert_close("y", y[rows], want, plain_error)
            error = ((y.double() - every).norm() / every.norm()).item()
            assert error < NORM, f"y: is {error:.3g} from the reference; expected less than {NORM}"
            for other in copies[1:]:
                assert name in PEERS_BESIDE or torch.equal(call(other), y), "y: the same layer gave other bits"
        except AssertionError as reason:
            wrong[name] = str(reason)
            del calls[name]
        except Exception as error:  # the reason why a path is not timed; a failed device raises again below
            torch.empty(1, device=p.x.device).fill_(0).item()
            wrong[name] = f"raised {type(error).__name__}: {error}"[:500]
            del calls[name]
    return wrong


def _in_turn(call: Call, copies: list[Problem], count: int) -> Callable[[], None]:
    def run() -> None:
        for p in itertools.islice(itertools.cycle(copies), count):
            call(p)

    return run


def _wall_us(call: Call, p: Problem) -> float:
    start = time.perf_counter()
    call(p)
    return round(1e6 * (time.perf_counter() - start), 3)


def _timed(row: Row, copies: list[Problem], calls: dict[str, Call], graph: bool) -> dict[str, list[float]]:
    """Microseconds of one call: name -> one number per round."""
    if row.device == "cpu":  # a rehearsal
        return {name: [_wall_us(call, copies[0])] for name, call in calls.items()}
    runs = {name: _in_turn(call, copies, CALLS) for name, call in calls.items()}
    if graph:
        runs = {name: graphed(run) for name, run in runs.items()}
    times = interleave(runs, row.device, row.seconds)
    return {name: [round(us / CALLS, 3) for us in samples["wall_us"]] for name, samples in times.items()}


def forward(row: Row) -> Record:
    """F.linear, the layer with its own choice, every path of it, the CUDA kernels, and a loop over the experts."""
    copies = problems(row)
    calls, cannot = _forward_calls(row, copies)
    with torch.no_grad():
        wrong = _check(row, copies, calls)
        if row.prepare:
            return {"wrong": wrong}
        calls[BASELINE] = lambda p: F.linear(p.x, p.weight, p.bias)
        return {"us": _timed(row, copies, calls, row.mode == "graph"), "cannot_run": cannot, "wrong": wrong}


def training(row: Row) -> Record:
    """Forward and backward with every gradient: F.linear, and the layer, whose gradients are checked first."""
    copies = []
    for p in problems(row):
        copies.append(replace(p, **{name: t.detach().requires_grad_() for name, t in p.tensors().items()}))
    p, wrong = copies[0], {}
    dy = torch.randn(row.tokens, p.weight.shape[0], device=row.device).to(DTYPE)
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router, "backend": "triton"}

    def ours(p: Problem) -> Any:
        return torch.autograd.grad(smile_linear(*p.arguments(), **options), [*p.tensors().values()], dy)

    def dense(p: Problem) -> Any:
        inputs = [t for t in (p.x, p.weight, p.bias) if t is not None]
        return torch.autograd.grad(F.linear(p.x, p.weight, p.bias), inputs, dy)

    calls: dict[str, Call] = {BASELINE: dense, "chosen": ours}
    _, ids = reference.route(p.x.detach().double(), p.rows().detach().double(), p.num_experts_per_tok)
    want = expectations(p, ids, dy=dy)
    try:
        for name, gradient in zip(p.tensors(), ours(p)):
            assert_close(f"d{name}", gradient, *want[name])
    except AssertionError as reason:
        wrong["chosen"] = str(reason)
        del calls["chosen"]
    if row.prepare:
        return {"wrong": wrong}
    return {"us": _timed(row, copies, calls, True), "cannot_run": {}, "wrong": wrong}


@contextmanager
def _one_after_another() -> Iterator[None]:
    """In this context no kernel starts before the previous one has ended."""
    device = configs.device_of
    configs.device_of = lambda d: replace(device(d), pdl=False)
    try:
        yield
    finally:
        configs.device_of = device


def kernels(row: Row) -> Record:
    """Microseconds of each kernel of a path separately, in the order of launches: path -> [name, median] for each.

    The two halves of a path alone. No kernel overlaps another here.
    """
    from torch.profiler import ProfilerActivity, profile

    copies = problems(row)
    calls, _ = _forward_calls(row, copies)
    found: dict[str, list[tuple[str, float]]] = {}
    with torch.no_grad(), _one_after_another():
        wrong = _check(row, copies, calls)
        # Triton's interpreter launches no kernel.
        for name, call in calls.items() if row.device == "cuda" and not row.prepare else []:
            run = _in_turn(call, copies, CALLS)
            run()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                run()
                torch.cuda.synchronize()
            events = [e for e in profiled.events() if e.device_type.name == "CUDA"]
            events = sorted(events, key=lambda e: e.time_range.start)
            each = len(events) // CALLS
            if each == 0 or len(events) % CALLS:
                wrong[name] = f"the profiler saw {len(events)} kernels of {CALLS} calls"
                continue
            times = [statistics.median(e.time_range.elapsed_us() for e in events[i::each]) for i in range(each)]
            found[name] = [(events[i].name[:60], round(us, 3)) for i, us in enumerate(times)]
    return {"kernels": found, "wrong": wrong}


@dataclass(frozen=True)
class Machine:
    """The machine and its limits; a rehearsal has none, since it measures nothing."""

    device: str
    rehearsal: bool

    name = "machine"


@dataclass(frozen=True)
class Listing:
    """The checks of a device, in a process that started after a library was built."""

    device: str

    name = "listing"


@dataclass(frozen=True)
class Soak:
    """Compare random layers on random paths with the reference for some time, with shapes up to `largest`."""

    device: str
    seconds: float
    largest: int = 2048
    skip: tuple[str, ...] = ()

    name = "soak"


def soak(job: Soak, seed: int | None = None) -> Record:
    """The number of random layers that agreed with the reference; the first one that does not raises, and is named."""
    import random

    start, count, draw = time.monotonic(), 0, random.Random(seed)

    def size(most: float) -> int:
        return round(most ** draw.random())

    while time.monotonic() - start < job.seconds:
        tokens, d, o = size(job.largest), size(job.largest * 0.7), size(job.largest * 0.7)
        n, r = size(min(64, job.largest)), size(min(128, job.largest))
        setting = Setting(n, r, size(min(32, d)), draw.randint(1, min(n, 4)))
        dtype, seed = draw.choice([torch.float32, torch.bfloat16, torch.float16]), draw.randrange(2**31)
        paths = triton_paths(job.device, dtype, tokens, n, max(r, setting.rank_of_router))
        linear, apply = draw.choice([p for p in paths if p[0] != "decode_one_launch" and " ".join(p) not in job.skip])
        shape = (tokens, d, o, *astuple(setting))
        try:
            perform(Check("triton", job.device, dtype, False, shape, linear, apply, seed=seed))
        except AssertionError as error:
            raise AssertionError(f"{linear} {apply}, {dtype}, {shape}, seed {seed}: {error}") from None
        count += 1
    return {"agreed": count}


def perform_job(job: Any) -> Any:
    """Run one job; the work of the processes that `bench.gpu` starts."""
    if isinstance(job, Machine):
        rates = [] if job.rehearsal else [limits(job.device, (DTYPE,))]
        return {"machine": {**machine(job.device), "rehearsal": job.rehearsal}, "limits": rates}
    if isinstance(job, Listing):
        return {"checks": checks(job.device)}
    if isinstance(job, Check):
        return perform(job)
    if isinstance(job, Soak):
        return {"name": job.name, "mode": "soak", **soak(job)}
    about = {"layer": job.layer, "setting": asdict(job.setting), "tokens": job.tokens, "mode": job.mode}
    trained = job.mode == "training"
    measure = training if trained else kernels if job.mode == "kernels" else forward
    return {"name": job.name, **about, **asdict(job.case.work(backward=trained)), **measure(job)}
