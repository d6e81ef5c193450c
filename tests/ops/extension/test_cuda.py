"""The CUDA kernels without a GPU: run on the CPU through emulation.h, and compiled by nvcc for every architecture."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from smile_kernels.ops import registration
from smile_kernels.testing import Problem, assert_close, expectations
from tests.ops.extension.builds import (
    CSRC,
    CUDA_SOURCES,
    EMULATION,
    HERE,
    SANITIZERS,
    cached,
    emulated_library,
    run_sanitized,
)
from tests.ops.extension.cases import SHAPES, check_backward, check_forward, check_routing
from tests.problems import PARTS, check_parts, problems_of_parts
from tests.routing.test_evidence import CASES as STEP_CASES
from tests.routing.test_evidence import STEPS, check_step, check_step_with_layer

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CASES = [
    *[(shape, torch.float32) for shape in SHAPES],
    *[(shape, torch.bfloat16) for shape in SHAPES[2:6:2]],
    *[(shape, torch.float16) for shape in SHAPES[3:5]],
    ((70, 530, 40, 3, 40, 4, 1), torch.bfloat16),  # the depth in two splits, a tile of 128 columns
    ((70, 530, 40, 2, 9, 12, 2), torch.float32),  # in two splits, a tile of 32 columns
    ((130, 600, 70, 40, 33, 2, 1), torch.float16),  # the experts chosen before their product
    ((33, 264, 40, 3, 9, 4, 2), torch.bfloat16),  # few tokens, more than one block has
    ((17, 40, 24, 40, 33, 2, 1), torch.float16),  # few tokens, the experts chosen before their product
]


@pytest.fixture(scope="module")
def ops():
    """The operators of the CUDA library, on CPU tensors."""
    torch.ops.load_library(emulated_library("-O2"))
    namespace = torch.ops.smile_kernels_emulated
    names = "route apply linear delta delta_ evidence evidence_linear route_backward apply_backward"
    return SimpleNamespace(**{name: getattr(namespace, name).default for name in names.split()})


@pytest.mark.parametrize("layout", ["two", "three, one dense"])
@pytest.mark.parametrize("tokens", [3, 70], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_match_reference(ops, layout, tokens, dtype):
    sizes, ranks = PARTS[layout]
    problems = problems_of_parts(sizes, ranks, tokens, 33, 4, 4, 2, dtype=dtype)
    delta_ = registration.by_part(ops.delta_)

    def layer(x, weight, bias, *experts, parts, rank_of_parts, routing, num_experts_per_tok, rank_of_router):
        y, routing = torch.nn.functional.linear(x, weight, bias), routing or (None, None)
        delta_(y, x, *experts, *routing, num_experts_per_tok, rank_of_router, False, parts, rank_of_parts)
        return y

    check_parts(problems, ranks, layer, backward=False)
    for p in problems:
        p.num_experts_per_tok = 3
    routing = torch.rand(tokens, len(sizes), 3), torch.randint(-1, 4, (tokens, len(sizes), 3), dtype=torch.int32)
    check_parts(problems, ranks, layer, backward=False, routing=routing)


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("poison", "nan nan 0 0 0 0"),
        ("copies", "nan nan 1 nan 1 5"),
        ("aligned matrix", "0 0 0 0 0 0"),
        ("forgotten copy", "a copy that no thread waited for"),
        ("unaligned copy", "an asynchronous copy that is not aligned"),
        ("unaligned matrix", "not aligned to 16 bytes"),
        ("lanes that disagree", "threads disagree about an operation"),
        ("tiles", "0 0 0 0 0 0"),
        ("early start", "0 0 0 1 1 1"),
        ("no wait", "starts early and does not wait for the previous one"),
        ("barrier", "a barrier after which some threads had already left"),
    ],
)
def test_the_emulation_notices(case, found):
    command = ("c++", "-std=c++20", "-O1", "-Wno-unknown-pragmas", *EMULATION, HERE / "emulation_checks.cpp", "-o")
    done = subprocess.run([cached("emulation_checks.out", command), case], capture_output=True, text=True)
    assert found in done.stdout + done.stderr
    assert (done.returncode == 0) == bool(done.stdout)


@pytest.mark.parametrize(
    ("shape", "dtype", "router"),
    [
        # Several blocks of everything take a minute in the emulation, once in `make test`.
        pytest.param(*case, router, marks=[pytest.mark.exhaustive] if case == CASES[4] and router else [])
        for router in (False, True)
        for case in CASES
    ],
    ids=str,
)
def test_forward_and_backward_match_reference(ops, shape, dtype, router):
    p = Problem.random(*shape, dtype=dtype, router=router, bias=router, expert_bias=not router)
    check_forward(ops, p)
    if p.x.numel() > 1:  # the error of plain PyTorch on a single number is not representative
        check_backward(ops, p)


ALL_AT_ONCE = ["project", "choose", "group", "expand"]


@pytest.mark.parametrize(
    ("shape", "router", "kernels"),
    [
        ((65, 40, 24, 4, 8, 4, 1), False, ALL_AT_ONCE),
        ((65, 40, 24, 4, 8, 4, 1), True, ALL_AT_ONCE),
        ((65, 40, 24, 4, 8, 4, 2), False, ["project", "choose", "expand"]),
        ((65, 40, 24, 40, 33, 2, 1), False, ["project", "choose", "group", "project", "expand"]),
        ((1, 40, 24, 4, 8, 4, 1), False, ["few_rows", "few_y"]),
        ((64, 40, 24, 4, 8, 4, 2), True, ["few_rows", "few_y"]),
        ((64, 40, 24, 40, 33, 2, 1), False, ["few_rows", "few_h", "few_y"]),
    ],
    ids=str,
)
def test_launches_of_a_call(ops, shape, router, kernels):
    """Without PyTorch's base product. Experts with many rows are chosen before their product."""
    library = ctypes.CDLL(str(emulated_library("-O2")))
    library.emulated_launches.restype = ctypes.c_char_p
    p = Problem.random(*shape, router=router)
    library.emulated_launches()
    weights, ids = ops.linear(*p.arguments(), p.num_experts_per_tok, p.rank_of_router, False)[1:3]
    assert re.findall(r"(\w+)_kernel", library.emulated_launches().decode()) == kernels
    ops.apply(*p.arguments()[:7], weights, ids, False)
    given = ["few_h", "few_y"] if shape[0] <= 64 else ["group", "project", "expand"]
    assert re.findall(r"(\w+)_kernel", library.emulated_launches().decode()) == given


@STEPS[0]
@STEPS[1]
def test_a_routing_step_follows_the_equations(ops, case, scope):
    def step(x, *rest):
        return ops.evidence(x.reshape(-1, x.shape[-1]), *rest)

    for dtype in (torch.float32, torch.bfloat16):
        check_step(case, scope, dtype, step=step)


@STEPS[0]
@pytest.mark.parametrize(("case", "dtype"), [("decode", torch.bfloat16), ("prompt", torch.float32)])
def test_a_routing_step_with_its_layer_is_both(ops, case, dtype, scope):
    check_step_with_layer(STEP_CASES[case], scope, dtype, ops)


@pytest.mark.parametrize("tokens", [5, 70], ids=["few", "many"])
def test_inputs_of_any_stride_and_alignment(ops, tokens):
    p = Problem.random(tokens, 64, 64, 4, 8, 8, 2)
    aligned = ops.linear(*p.arguments(), 2, 8, True)
    p.vh, p.u, p.weight = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (p.vh, p.u, p.weight))
    for got, want in zip(ops.linear(*p.arguments(), 2, 8, True), aligned):
        assert torch.equal(got, want), "16-byte loads change the result"
    for x in (p.x.T.contiguous().T, torch.cat([p.x, p.x], 1)[:, 64:], torch.cat([p.x, p.x], 1)[:, 63:127]):
        p.x = x
        check_forward(ops, p)


def test_repeated_experts_each_contribute(ops):
    for tokens in (6, 70):
        p = Problem.random(tokens, 24, 20, 4, 4, 2, 3)
        ids, weights = torch.randint(2, (tokens, 3), dtype=torch.int32), torch.rand(tokens, 3)
        y, h = ops.apply(*p.arguments()[:7], weights, ids, True)
        dy = torch.randn_like(y)
        want = expectations(p, ids, weights=weights, dy=dy)
        assert_close("y", y, *want["y"])
        got = ops.apply_backward(dy, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h, 0xFF)
        for i, name in enumerate(["x", "weight", "bias", "vh", "s", "u", "expert_bias", "weights"]):
            assert_close(f"d{name}", got[i], *want[name])


def test_ties_extremes_and_nonfinite_rows(ops):
    for tokens in (8, 70):
        p = Problem.random(tokens, 16, 8, 40, 4, 4, 3)
        p.vh[1:] = p.vh[:1]
        weights, ids = ops.route(p.x, p.rows(), 3)
        assert ids.tolist() == [[0, 1, 2]] * tokens
        assert torch.equal(weights, torch.full((tokens, 3), 1 / 3))

        p = Problem.random(tokens, 16, 8, 6, 4, 4, 2)
        ordinary = ops.linear(*p.arguments(), 2, 4, False)
        p.x[0] *= 1e19
        p.x[1] *= 1e-30
        p.x[2, 3], p.x[3, 5] = float("nan"), float("inf")
        y, weights, ids, _ = ops.linear(*p.arguments(), 2, 4, False)
        assert torch.equal(ids[:2], ordinary[2][:2])
        assert weights.isfinite().all()
        assert all(torch.equal(a[4:], b[4:]) for a, b in zip((y, weights, ids), ordinary))


@pytest.mark.parametrize("tokens", [7, 90], ids=["few", "many"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("none", [-1, 6, 2**31 - 1, -(2**31)])
def test_ids_outside_the_range_are_no_expert(ops, tokens, m, none):
    p = Problem.random(tokens, 40, 72, 6, 5, 3, m)
    weights, ids = ops.route(p.x, p.rows(), m)
    absent = torch.rand(tokens, m) < 0.3
    absent[3] = True
    ids[absent] = none
    weights[absent] = float("nan")
    y, h = ops.apply(*p.arguments()[:7], weights, ids, True)
    dy = torch.randn_like(y)
    got = ops.apply_backward(dy, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h, 0xFF)
    want = expectations(p, torch.where(absent, -1, ids), weights=weights, dy=dy)
    assert not h[absent].any()
    assert not got[7][absent].any()
    assert_close("y", y, *want["y"])
    for name, gradient in zip(("x", "weight", "bias", "vh", "s", "u", "expert_bias", "weights"), got):
        assert_close(f"d{name}", gradient, *want[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_non_finite_expert_reaches_its_own_tokens_only(ops, dtype):
    p = Problem.random(100, 40, 72, 4, 5, 3, 2, dtype=dtype)
    y, weights, ids, h = ops.linear(*p.arguments(), 2, 3, True)
    dy = torch.randn_like(y)
    want = expectations(p, ids, weights=weights, dy=dy)
    others = (ids != 2).all(1)
    assert others.any()
    assert not others.all()
    p.u[2, 5, 1], p.u[2, 6, 2], p.vh[2, 4, 7] = float("inf"), float("nan"), float("inf")
    bad = ops.linear(*p.arguments(), 2, 3, False)[0]
    assert_close("y", bad[others], want["y"][0][others], want["y"][1])
    assert not bad[~others][:, [5, 6]].isfinite().any()
    saved = (p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h)
    dx = ops.apply_backward(dy, *saved, 1)[0]
    assert_close("dx", dx[others], want["x"][0][others], want["x"][1])


def test_what_does_not_fit_is_named_in_the_backward(ops):
    p = Problem.random(12, 24, 16, 3, 4, 2, 2)
    y, weights, ids, h = ops.linear(*p.arguments(), 2, 2, True)
    arguments = dict(
        dy=y, x=p.x, weight=p.weight, vh=p.vh, s=p.s, u=p.u, expert_bias=p.expert_bias, weights=weights, ids=ids, h=h
    )
    for name in ("dy", "weight", "vh", "s", "u", "expert_bias", "weights", "ids", "h"):
        wrong = {torch.float32: torch.float64, torch.int32: torch.int64}[arguments[name].dtype]
        with pytest.raises(RuntimeError, match=f" {name}: has another dtype"):
            ops.apply_backward(*(arguments | {name: arguments[name].to(wrong)}).values(), 0xFF)
    arguments = dict(dweights=weights, x=p.x, router=p.vh, weights=weights, ids=ids)
    for name in ("dweights", "router", "weights", "ids"):
        wrong = {torch.float32: torch.float64, torch.int32: torch.int64}[arguments[name].dtype]
        with pytest.raises(RuntimeError, match=f" {name}: has another dtype"):
            ops.route_backward(*(arguments | {name: arguments[name].to(wrong)}).values(), 3)


def test_entries_of_many_blocks(ops):
    """More than one block places, and more than one block counts at once."""
    p = Problem.random(4200, 16, 8, 5, 2, 2, 2)
    weights, ids = ops.route(p.x, p.rows(), 2)
    ids[1000:2000, 1] = -1
    y, h = ops.apply(*p.arguments()[:7], weights, ids, True)
    dy = torch.randn_like(y)
    want = expectations(p, ids, weights=weights, dy=dy)
    assert_close("y", y, *want["y"])
    got = ops.apply_backward(dy, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h, 0b101000)
    assert_close("dvh", got[3], *want["vh"])
    assert_close("du", got[5], *want["u"])


def test_largest_number_of_experts(ops):
    p = Problem.random(12, 16, 24, 256, 2, 1, 256)
    y, weights, ids, _ = ops.linear(*p.arguments(), 256, 1, False)
    check_routing(p, weights, ids)
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"])


def test_no_tokens(ops):
    p = Problem.random(0, 24, 12, 3, 4, 2, 2)
    y, weights, ids, h = ops.linear(*p.arguments(), 2, 2, True)
    assert y.shape == (0, 12)
    arguments = (y, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h)
    for got, like in zip(ops.apply_backward(*arguments, 0xFF), (p.x, p.weight, p.bias, p.vh, p.s, p.u, p.expert_bias)):
        assert torch.equal(got, torch.zeros_like(like))
    dx, drouter = ops.route_backward(weights, p.x, p.rows(), weights, ids, 3)
    assert dx.shape == p.x.shape
    assert not drouter.any()


def test_what_the_kernels_do_not_take_is_refused(ops):
    p = Problem.random(4, 24, 16, 3, 4, 2, 2)
    with pytest.raises(RuntimeError, match="x: is float64"):
        ops.linear(*p.to(torch.float64).arguments(), 2, 2, False)
    p = Problem.random(4, 24, 16, 257, 4, 2, 2)
    with pytest.raises(RuntimeError, match="num_local_experts: is 257"):
        ops.linear(*p.arguments(), 2, 2, False)


@pytest.mark.exhaustive  # it compiles for 40 seconds; the emulation of the other tests poisons memory too
def test_clean_under_sanitizers():
    """AddressSanitizer and UBSan find nothing in kernels, launchers and bindings, forward and backward."""
    assert run_sanitized(emulated_library(*SANITIZERS), "emulated").split()[-1] == "clean"


# ---- nvcc ----

ARCHITECTURES = (75, 80, 90, 100)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compiled(source: str):
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return cached(
        f"{source}.o", ("nvcc", "-std=c++17", "-O3", "--threads=2", *gencode, "-Xptxas=-v", "-c", CSRC / source, "-o")
    )


@needs_nvcc
@pytest.mark.parametrize("source", CUDA_SOURCES)
def test_every_kernel_compiles_for_every_architecture_without_spills(source):
    report = compiled(source).with_suffix(".log").read_text()
    names = set(re.findall(r"__global__ [^;{]*?(\w+_kernel)\(", (CSRC / source).read_text()))
    for a in ARCHITECTURES:
        functions = re.findall(rf"Compiling entry function '(\w+)' for 'sm_{a}'", report)
        assert functions, f"nothing was compiled for sm_{a}"
        assert names <= {name for name in names for f in functions if name in f}, f"a kernel is missing on sm_{a}"
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames
    assert set(frames) == {("0", "0", "0")}
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 255
    assert max(int(n) for n in re.findall(r"(\d+) bytes smem", report)) <= 48 * 1024


def machine_code(source: str, kernels: str) -> dict[int, dict[str, str]]:
    """For each architecture the instructions of the kernels for 16-bit numbers named by the expression `kernels`."""
    tools = Path(triton.__path__[0]) / "backends/nvidia/bin"
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    report = compiled(source).with_suffix(".log").read_text()
    half = set(re.findall(rf"entry function '(\w*(?:{kernels})_kernelI(?:6__half|13__nv_bfloat16)\w*)'", report))
    assert half
    command = ["cuobjdump", "--dump-sass", "-fun", ",".join(sorted(half)), compiled(source)]
    dump = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    of_architecture = {}
    for a in ARCHITECTURES:
        code = dump[dump.index(f"code for sm_{a}") :].split("\nFatbin")[0]
        of_architecture[a] = dict(function.split("\n", 1) for function in code.split("Function : ")[1:])
        assert set(of_architecture[a]) == half
    return of_architecture


@needs_nvcc
@pytest.mark.parametrize("source", ["project.cu", "forward.cu", "backward.cu"])
def test_products_use_tensor_cores_and_16_byte_copies(source):
    for a, kernels in machine_code(source, "project|expand|accumulate").items():
        for name, instructions in kernels.items():
            # bfloat16 has tensor cores from sm_80 on.
            on_tensor_cores = a >= 80 or "__half" in name
            assert ("HMMA" in instructions) == on_tensor_cores, f"{name} on sm_{a}"
            assert ("LDSM" in instructions) == on_tensor_cores, f"{name} on sm_{a}"
            assert re.search(r"LDGSTS[.\w]*128" if a >= 80 else r"LDG[.\w]*128", instructions), f"{name} on sm_{a}"


@needs_nvcc
def test_few_tokens_use_tensor_cores_and_overlap():
    for a, kernels in machine_code("decode.cu", "few_rows|few_h|few_y").items():
        for name, instructions in kernels.items():
            assert ("HMMA" in instructions) == (a >= 80 or "__half" in name), f"{name} on sm_{a}"
            assert re.search(r"LDG[.\w]*128", instructions), f"{name} on sm_{a}"
            # From sm_90 on the first kernel lets the next one start, which waits after its product with W.
            last = "few_y" in name
            assert ("PREEXIT" in instructions) == (a >= 90 and not last), f"{name} on sm_{a}"
            assert ("ACQBULK" in instructions) == (a >= 90 and last), f"{name} on sm_{a}"
            if a >= 90 and last:
                assert "HMMA" not in instructions[instructions.index("ACQBULK") :], f"{name} on sm_{a}"
                assert "STG" not in instructions[: instructions.index("ACQBULK")], f"{name} on sm_{a}"
            if a == 90 and "few_h" not in name:  # all loads of four steps precede the first product
                ahead = re.findall(r"LDG[.\w]*128", instructions[: instructions.index("HMMA")])
                assert len(ahead) >= (16 if last else 12), f"{name} on sm_{a}"
