"""Tests that need a GPU: real sizes, CUDA graphs, no waiting for the host, equal bits, streams, devices.

The CUDA kernels of the compiled extension run the same tests if their library is built.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

from smile_kernels.functional import smile_linear
from smile_kernels.ops import extension, library, reference
from smile_kernels.ops.triton import backend, configs
from smile_kernels.testing import Problem, assert_close, expectations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# N, r, g, m
SETTINGS = [(8, 32, 16, 1), (8, 128, 16, 1), (8, 32, 16, 2), (3, 512, 8, 1), (64, 64, 8, 1)]
# Linear path, apply path, and whether it supports more than 16 tokens.
PATHS = [
    ("decode", "fused", False),
    ("decode_one_launch", "fused", False),
    ("route_first", "fused", False),
    ("one_product", "fused", True),
    ("one_product", "tma", True),
    ("one_product", "delta", True),
    ("route_first", "grouped", True),
]


def problem(tokens: int, d: int, o: int, setting, **options) -> Problem:
    return Problem.random(tokens, d, o, *setting, device="cuda", **{"dtype": torch.bfloat16, **options})


@pytest.fixture(params=["triton", "cuda"])
def name(request) -> str:
    """A backend that runs on this GPU."""
    if reason := library.why_not(request.param, "cuda"):
        pytest.skip(reason)
    return request.param


def linear(p: Problem, name: str = "triton"):
    operators = {"triton": backend, "cuda": extension}[name]
    return operators.linear(*p.arguments(), p.num_experts_per_tok, p.rank_of_router, False)


def call(p: Problem, name: str) -> torch.Tensor:
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router, "backend": name}
    return smile_linear(*p.arguments(), **options)


def check(p: Problem, name: str = "triton", tf32: bool = False) -> None:
    """y, and the choice of experts, which may differ from the reference only where scores are equal up to rounding."""
    y, weights, ids, _ = linear(p, name)
    scores = reference.scores(p.x.double(), p.rows().double())
    best = scores.sort(-1, descending=True).values[:, : p.num_experts_per_tok]
    chosen = scores.gather(1, ids.long())
    assert ((best - chosen).abs() <= 1e-5 * best).all()
    torch.testing.assert_close(weights, chosen.softmax(-1).float(), rtol=1e-4, atol=1e-6)
    want, plain_error = expectations(p, ids)["y"]
    if p.x.dtype == torch.float32:
        # cuBLAS adds short sums; a kernel may add one number after another, with a random rounding error for each.
        one_by_one = p.x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps / 2 * want.abs().max().item()
        plain_error = max(plain_error, one_by_one)
    if tf32:
        # Triton truncates operands to TF32, cuBLAS may round them.
        cut = {name: _cut_to_tf32(t) for name, t in p.tensors().items() if name != "s"}
        plain_error = max(plain_error, (expectations(replace(p, **cut), ids)["y"][0] - want).abs().max().item())
    assert_close("y", y, want, plain_error)


def _cut_to_tf32(t: torch.Tensor) -> torch.Tensor:
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 2048])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_regime_matches_the_reference(setting, tokens, name):
    check(problem(tokens, 1024, 1536, setting), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [3, 100, 1000])
def test_other_dtypes_match_the_reference(tokens, dtype, name):
    check(problem(tokens, 1000, 1480, SETTINGS[2], dtype=dtype), name)


@pytest.mark.parametrize("tokens", [3, 1000])
def test_tf32_where_torch_allows_it(tokens):
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check(problem(tokens, 1024, 1536, SETTINGS[0], dtype=torch.float32), tf32=True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@contextlib.contextmanager
def no_waiting_for_the_host():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_captured(p: Problem, name: str) -> None:
    linear(p, name)
    with no_waiting_for_the_host():
        eager = linear(p, name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(p, name)
    for t in captured:
        t.fill_(-1)
    graph.replay()
    for a, b in zip(captured, eager):
        assert torch.equal(a, b)
    p.x.copy_(torch.randn_like(p.x))
    graph.replay()
    graph.replay()
    for a, b in zip(captured, linear(p, name)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("linear_path", "apply_path", "many"), PATHS)
def test_a_captured_graph_gives_the_bits_of_eager_calls(linear_path, apply_path, many, take):
    take(linear_path, apply_path)
    check_captured(problem(1000 if many else 16, 1024, 1536, SETTINGS[0]), "triton")


@pytest.mark.parametrize("tokens", [1, 16, 64, 1000])
def test_a_captured_graph_of_the_chosen_path_gives_the_bits_of_eager_calls(tokens, name):
    check_captured(problem(tokens, 1024, 1536, SETTINGS[2]), name)


@pytest.mark.parametrize(("linear_path", "apply_path", "many"), PATHS)
def test_launches_that_overlap_give_the_bits_of_those_that_do_not(linear_path, apply_path, many, take, monkeypatch):
    monkeypatch.undo()  # Poisoning launches other kernels, so that nothing overlaps.
    take(linear_path, apply_path)
    problems = [problem(1000 if many else 16, 1024, 1536, SETTINGS[0], seed=i) for i in range(2)]
    device = configs.device_of(problems[0].x.device)
    with monkeypatch.context() as patch:
        patch.setattr(configs, "device", lambda _: replace(device, pdl=False))
        want = [linear(p) for p in problems]
    for _ in range(100):
        for p, outputs in zip(problems, want):
            for a, b in zip(linear(p), outputs):
                assert torch.equal(a, b)


@pytest.mark.parametrize("apply", ["delta", "grouped"])
def test_launches_of_the_backward_that_overlap_give_the_bits_of_those_that_do_not(apply, take, monkeypatch):
    monkeypatch.undo()  # As above.
    take("route_first" if apply == "grouped" else "one_product", apply)
    problems = [problem(1000, 1024, 1536, SETTINGS[2], seed=i) for i in range(2)]
    leaves = [[t.requires_grad_() for t in p.tensors().values()] for p in problems]
    dy = torch.randn(1000, 1536, device="cuda", dtype=torch.bfloat16)

    def gradients(i):
        return torch.autograd.grad(call(problems[i], "triton"), leaves[i], dy)

    device = configs.device_of(problems[0].x.device)
    with monkeypatch.context() as patch:
        patch.setattr(configs, "device", lambda _: replace(device, pdl=False))
        want = [gradients(i) for i in range(2)]
    for _ in range(50):
        for i in range(2):
            for a, b in zip(gradients(i), want[i]):
                assert torch.equal(a, b)


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[4]], ids=str)
def test_forward_and_backward_give_the_same_bits_again(setting, name):
    p = problem(2000, 1024, 1536, setting, router=True)
    leaves = [t.requires_grad_() for t in p.tensors().values()]
    dy = torch.randn(2000, 1536, device="cuda", dtype=torch.bfloat16)

    def run():
        y = call(p, name)
        return y, *torch.autograd.grad(y, leaves, dy)

    first = run()
    for _ in range(3):
        with no_waiting_for_the_host():
            again = run()
        for a, b in zip(first, again):
            assert torch.equal(a, b)


@pytest.mark.parametrize("apply", ["delta", "grouped"])
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[3]], ids=str)
def test_backward_matches_the_reference(setting, apply, name, take):
    take("route_first" if apply == "grouped" else "one_product", apply)
    p = problem(400, 512, 768, setting)
    leaves = {tensor: t.requires_grad_() for tensor, t in p.tensors().items()}
    y = call(p, name)
    with torch.no_grad():
        _, _, ids, _ = linear(p, name)
    dy = torch.randn(400, 768, device="cuda").to(y.dtype)
    expected = expectations(p, ids, dy=dy)
    for tensor, gradient in zip(leaves, torch.autograd.grad(y, leaves.values(), dy)):
        assert_close(f"d{tensor}", gradient, *expected[tensor])


@pytest.mark.parametrize("path", ["decode", "decode_one_launch"])
def test_decode_never_mixes_two_streams(path, take):
    take(path)
    problems = [problem(8, 2048, 4096, SETTINGS[0], seed=i) for i in range(2)]
    want = [linear(p)[0] for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    out = [[], []]
    for _ in range(500):
        for p, stream, ys in zip(problems, streams, out):
            with torch.cuda.stream(stream):
                ys.append(linear(p)[0])
    torch.cuda.synchronize()
    for w, ys in zip(want, out):
        assert all(torch.equal(w, y) for y in ys)


@pytest.mark.parametrize("tokens", [4, 500])
def test_the_callers_stream(tokens, name):
    p = problem(tokens, 1024, 1024, SETTINGS[0])
    want, x = linear(p, name)[0], p.x.clone()
    p.x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        p.x.copy_(x)
        y = linear(p, name)[0]
    stream.synchronize()
    assert torch.equal(y, want)


def test_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = problem(40, 512, 512, SETTINGS[0])
    there = Problem(**{k: t.to("cuda:1") if isinstance(t, torch.Tensor) else t for k, t in vars(p).items()})
    y = linear(there, name)[0]
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to("cuda:0"), linear(p, name)[0])


def test_more_than_2_to_the_31_elements(name, monkeypatch):
    monkeypatch.undo()  # Filling gigabytes with NaN would take as long as all other tests.
    p = problem(1, 4096, 4096, SETTINGS[0])
    tokens = 2**31 // 4096 + 200
    p.x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    y, _, ids, _ = linear(p, name)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 129, tokens - 1], device="cuda")
    p.x = p.x[rows]
    assert_close("y", y[rows], *expectations(p, ids[rows])["y"])


def test_compiled_by_inductor(name):
    p = problem(64, 512, 512, SETTINGS[0])
    options = {"num_experts_per_tok": 1, "rank_of_router": 16, "backend": name}
    compiled = torch.compile(lambda x: smile_linear(x, *p.arguments()[1:], **options).relu(), fullgraph=True)
    assert torch.equal(compiled(p.x), linear(p, name)[0].relu())


def test_what_this_device_is():
    device = configs.device_of(torch.device("cuda", torch.cuda.current_device()))
    assert device.family in configs.TILES
    if torch.cuda.get_device_capability() == (9, 0):
        assert device == configs.Device(device.name, "sm90", device.multiprocessors, pdl=True, tma=True)
