"""Every kernel as compiled for an H200, executed without one: accesses outside of tensors, and races between programs.

`make test-races` runs the kernels' tests, and those at the end of this file, with this module as a plugin of pytest.
Each launch is compiled to Triton's IR with the tiles of compute capability 9.0, and ttsem executes that on the CPU,
program after program. Each tensor ends where its storage ends, also the parts of a workspace. A fault raises at the
kernel's line.

Not covered: launches that overlap (PDL); the order of programs by the counters of `decode`, and programs of one launch
that wait for each other, so that such a launch has one program; Triton's later passes; and the tests in `LEFT_OUT`.
"""

import collections
import contextlib
import math
import os

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from ttsem import sanitize
from ttsem.sanitize import KernelFault

from smile_kernels.ops.triton import backend, backward, configs, decode, evidence, expand, grouped, route, shrink
from smile_kernels.ops.triton.launch import Plan
from smile_kernels.testing import Problem, taking

GPU = configs.Device("NVIDIA H200", "sm90", 132, pdl=False, tma=True)
# Programs of `decode` hand these to each other, ordered by its counters.
ORDERED = {"partial", "arrivals"}
LEFT_OUT = {
    "test_offsets_beyond_32_bits": "each launch would copy 5 GB",
    "test_compiled_without_graph_breaks": "torch.compile reads the random state of the GPU",
    "test_opcheck": "it does the same",
}


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"


# What is launched takes PDL and tensors.
KERNELS = {
    name_of(kernel)
    for module in (decode, shrink, route, expand, grouped, backward, evidence)
    for kernel in vars(module).values()
    if isinstance(kernel, JITFunction) and kernel.arg_names[-1:] != ["PDL"] and "PDL" in kernel.arg_names
}


def _spans(record, names, _) -> list[tuple[int, int]]:
    """The addresses of a launch's tensors of these names."""
    return [(record.bases[name], record.bases[name] + record.pre[name].nbytes) for name in names]


@pytest.fixture(autouse=True)
def programs(monkeypatch, record_property):
    """Launches are executed by ttsem; kernel -> the numbers of programs of its launches."""
    why_not, plan = backend.why_not, decode.plan
    launched = collections.defaultdict(list)

    def run(plan: Plan, *tensors) -> None:
        """As `Plan.run`, with a storage for each part of the workspace."""
        parts = [tensors[0].new_empty(shape, dtype=dtype) for _, shape, dtype in plan.parts]
        for launch, pick in zip(plan.launches, plan.picks):
            launched[name_of(launch.kernel)].append(math.prod(launch.grid))
            launch.by_triton(pick([*tensors, *parts, None]))

    def plan_of_decode(device, *arguments):
        return plan(device._replace(multiprocessors=1) if arguments[-1] else device, *arguments)

    monkeypatch.setattr(configs, "device_of", lambda _: GPU)
    monkeypatch.setattr(backend, "why_not", lambda _, *layer: why_not("cuda", *layer))
    monkeypatch.setattr(decode, "plan", plan_of_decode)
    monkeypatch.setattr(decode, "arrivals", lambda _: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr(Plan, "run", run)
    monkeypatch.setattr(sanitize, "lookback_buffers", lambda kernel, _: ORDERED if kernel is decode._decode.fn else ())
    monkeypatch.setattr(sanitize, "_protocol_spans", _spans)
    with sanitize.session(cuda_is_cpu=False) as session:
        yield launched
    record_property("programs", dict(launched))
    if session.races_unchecked:
        pytest.fail(f"{session.races_unchecked} launches are too large to be checked for races")


def pytest_collection_modifyitems(config, items) -> None:
    left_out = [item for item in items if item.originalname in LEFT_OUT]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    found = collections.defaultdict(list)
    for report in reports:
        if getattr(report, "when", None) == "teardown":
            for kernel, programs in dict(report.user_properties).get("programs", {}).items():
                found[kernel] += programs
    several = {kernel: sum(n > 1 for n in programs) for kernel, programs in found.items()}
    terminalreporter.section("launches executed")
    terminalreporter.line(f"{sum(map(len, found.values()))}, of which {sum(several.values())} with several programs")
    for kernel, programs in sorted(found.items()):
        terminalreporter.line(f"{kernel}: {len(programs)}, {several[kernel]}")
    for name, reason in LEFT_OUT.items():
        terminalreporter.line(f"left out: {name}: {reason}")


def layer(tokens: int, linear: str, apply: str, training: bool = False, n: int = 5, **options) -> None:
    """A layer of several tiles in every dimension, the last of them not full."""
    p = Problem.random(tokens, 168, 100, n, 40, 24, 2, **{"dtype": torch.bfloat16, **options})
    m, g, parameters = p.num_experts_per_tok, p.rank_of_router, p.arguments()[1:]
    with taking(linear, apply):
        y, weights, ids, h = backend.linear(p.x, *parameters, m, g, training)
        if training:
            factors = y, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias
            backend.linear_backward(*factors, p.router, weights, ids, h, g, [True] * 7 + [p.router is not None])


def step(scope: int) -> None:
    """A routing step over 3 sequences, with all optional arguments."""
    x, router = torch.randn(3 * 70, 24), torch.randn(20, 8, 24)
    real, rows = torch.rand(3, 70) > 0.2, 1 if scope == 2 else 70
    state = torch.rand(20), real, torch.rand(3, 70), torch.rand(3, 20), torch.rand(3, rows, 20)
    backend.evidence(x, router, *state, 2, 8, 3, scope, True)


PREFILL = {"shrink._shrink", "route._route", "expand._expand"}
BACKWARD = {"backward._scale_backward"}
GROUPED = {f"grouped.{name}" for name in ("_count", "_schedule", "_sort", "_shrink", "_scale", "_expand")}
GROUPED_BACKWARD = BACKWARD | {"backward._outer", "backward._sum"}
# Case -> the call, and the kernels of which it launches several programs.
CASES = {
    "decode": (lambda: layer(16, "decode", "fused", n=4), {"decode._decode"}),
    "fused": (lambda: layer(70, "one_product", "fused"), PREFILL),
    "tma": (lambda: layer(70, "one_product", "tma"), PREFILL),
    "delta": (lambda: layer(70, "one_product", "delta", True), PREFILL | BACKWARD),
    "float32": (lambda: layer(70, "one_product", "fused", True, dtype=torch.float32), PREFILL | BACKWARD),
    "router": (lambda: layer(70, "route_first", "fused", True, router=True), PREFILL | {"backward._score_backward"}),
    "grouped": (lambda: layer(70, "route_first", "grouped", True, n=40), GROUPED | GROUPED_BACKWARD),
    **{f"evidence, scope {scope}": (lambda scope=scope: step(scope), {"evidence._evidence"}) for scope in range(3)},
}


@pytest.mark.parametrize("case", CASES)
def test_several_programs(case, programs):
    call, kernels = CASES[case]
    call()
    assert {kernel for kernel, counts in programs.items() if max(counts) > 1} >= kernels, dict(programs)


def test_every_kernel_has_a_case():
    assert set.union(*(kernels for _, kernels in CASES.values())) == KERNELS


@triton.jit
def _each_row(x, y, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + n, tl.load(x + n, mask=n < N, other=0.0))


def test_a_store_without_a_mask_is_found():
    with pytest.raises(KernelFault, match=r"races.py:\d+: tl.store.* writes 12 element\(s\) past the end"):
        _each_row[(2,)](torch.ones(20), torch.zeros(20), 20, BLOCK=16)


@contextlib.contextmanager
def planted(kernel: JITFunction, line: str, fault: str):
    source = kernel.src
    assert source.count(line) == 1
    kernel._unsafe_update_src(source.replace(line, fault))
    try:
        yield
    finally:
        kernel._unsafe_update_src(source)


def test_a_store_into_the_next_part_of_a_workspace_is_found():
    with (
        planted(shrink._shrink, "mask=(t < written_t)[:, None]", "mask=(t < T + 1)[:, None]"),
        pytest.raises(KernelFault, match=r"shrink.py:\d+: tl.store.* past the end of the tensor passed as `partial`"),
    ):
        layer(70, "one_product", "fused")


def test_programs_that_write_the_same_are_found():
    with (
        planted(shrink._shrink, "partial + (split.to(tl.int64) * T", "partial + (split.to(tl.int64) // 2 * T"),
        pytest.raises(KernelFault, match=r"shrink.py:\d+: tl.store.*both touch element 0 of `partial`"),
    ):
        layer(70, "one_product", "fused")


def test_a_choice_by_every_program_of_decode_is_found():
    with (
        planted(decode._decode, "if (pid < slices) & (arrived == owners - 1):", "if pid < slices:"),
        pytest.raises(
            KernelFault, match=r"decode.py:\d+: tl.store.*both touch element \d+ of `(weights|ids|scaled|gates)`"
        ),
    ):
        layer(16, "decode", "fused", n=4)
