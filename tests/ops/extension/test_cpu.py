"""The compiled CPU operator, compared with the reference and checked with PyTorch's own tests."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

import smile_kernels as sk
from smile_kernels.ops import extension
from smile_kernels.testing import Problem, assert_close, expectations
from tests.ops.extension.builds import SANITIZERS, cpu_library, run_sanitized
from tests.ops.extension.cases import DTYPES, SHAPES, SHAPES_OF_PANELS, check_backward, check_forward
from tests.problems import problems_of_parts, side_by_side

pytestmark = pytest.mark.usefixtures("poisoned_memory")
COMPILED = torch.ops.smile_kernels_ext


@pytest.fixture(autouse=True, scope="module")
def _built():
    assert extension.unavailable("cpu") is None, extension.unavailable("cpu")


def test_an_old_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert extension.unavailable.__wrapped__("cpu") == "it needs PyTorch 2.10 or later, not 2.9.1+cu128"


def linear(problem: Problem, save: bool = False):
    return extension.linear(*problem.arguments(), problem.num_experts_per_tok, problem.rank_of_router, save)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + SHAPES_OF_PANELS, ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["biases", "no-bias"])
def test_forward_matches_reference(shape, dtype, bare):
    bias = dict(bias=not bare, expert_bias=not bare, router=bare)
    check_forward(extension, Problem.random(*shape, dtype=dtype, **bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["biases", "no-bias"])
def test_backward_matches_reference(shape, dtype, bare):
    bias = dict(bias=not bare, expert_bias=not bare, router=bare)
    check_backward(COMPILED, Problem.random(*shape, dtype=dtype, **bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_any_stride_and_alignment(dtype):
    p = Problem.random(37, 51, 45, 5, 6, 4, 2, dtype=dtype)
    p.vh, p.u, p.weight = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (p.vh, p.u, p.weight))
    for x in (
        p.x.T.contiguous().T,
        torch.cat([p.x, p.x], 1)[:, 51:],
        p.x[:1].expand(37, -1),
        p.x[::3],
        p.x[:, ::1][3:],
    ):
        p.x = x
        check_forward(extension, p)
    p.vh, p.u, p.weight = (t.mT.contiguous().mT for t in (p.vh, p.u, p.weight))
    for tokens in (34, 5):
        p.x = p.x[:tokens]
        check_forward(extension, p)


def test_gradients_of_any_stride():
    p = Problem.random(37, 51, 45, 5, 6, 4, 2)
    for x in (p.x.T.contiguous().T, torch.cat([p.x, p.x], 1)[:, 51:], p.x[:1].expand(37, -1), p.x[::3]):
        p.x = x
        check_backward(COMPILED, p)
    p.vh, p.u, p.weight = (t.mT.contiguous().mT for t in (p.vh, p.u, p.weight))
    check_backward(COMPILED, p)


def test_gradients_of_no_tokens_and_of_experts_without_any():
    p = Problem.random(0, 24, 12, 3, 4, 2, 2)
    y, weights, ids, h = COMPILED.linear(*p.arguments(), 2, 2, True)
    arguments = (y, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h)
    for got, like in zip(COMPILED.apply_backward(*arguments, 0xFF), (p.x, p.weight, p.bias, p.vh, p.s, p.u)):
        assert torch.equal(got, torch.zeros_like(like))
    dx, drouter = COMPILED.route_backward(weights, p.x, p.rows(), weights, ids, 3)
    assert dx.shape == p.x.shape
    assert not drouter.any()

    p = Problem.random(20, 24, 70, 6, 4, 2, 2, dtype=torch.float64)
    weights, ids = torch.rand(20, 2, dtype=torch.float64), torch.randint(-1, 2, (20, 2), dtype=torch.int32)
    y, h = COMPILED.apply(*p.arguments()[:7], weights, ids, True)
    dy = torch.randn_like(y)
    got = COMPILED.apply_backward(dy, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h, 0xFF)
    want = expectations(p, ids, weights=weights, dy=dy)
    for gradient, name in zip(got, ("x", "weight", "bias", "vh", "s", "u", "expert_bias", "weights")):
        assert_close(f"d{name}", gradient, *want[name])
    for gradient in got[3:7]:
        assert not gradient[2:].any()


def test_no_tokens():
    y, weights, ids, h = linear(Problem.random(0, 24, 12, 3, 4, 2, 2), save=True)
    assert [t.shape for t in (y, weights, ids, h)] == [(0, 12), (0, 2), (0, 2), (0, 2, 4)]


def test_repeated_experts_each_contribute():
    p = Problem.random(9, 24, 20, 4, 4, 2, 3)
    ids, weights = torch.randint(2, (9, 3), dtype=torch.int32), torch.rand(9, 3)
    y, _ = extension.apply(*p.arguments()[:7], weights, ids, False)
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"])


def test_ties_go_to_the_lower_index():
    p = Problem.random(40, 16, 8, 6, 4, 4, 3)
    p.vh[1:] = p.vh[:1]
    weights, ids = linear(p)[1:3]
    assert ids.tolist() == [[0, 1, 2]] * 40
    assert torch.equal(weights, torch.full((40, 3), 1 / 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_ends_of_the_range(dtype):
    """Norms whose squares overflow or vanish, denormal numbers, NaN and infinity in some rows only."""
    info = torch.finfo(dtype)
    p = Problem.random(24, 32, 16, 4, 4, 4, 2, dtype=dtype)
    ordinary = linear(p)
    root = info.max**0.5
    p.x[0] *= root
    p.x[1] /= root
    p.x[2] = info.smallest_normal / 4
    p.x[3, 5], p.x[4, 6], p.x[5] = float("nan"), float("inf"), 0
    y, weights, ids, _ = linear(p)
    assert torch.equal(ids[:2], ordinary[2][:2]), "scaling x changed the order of its scores"
    assert torch.equal(weights[0], torch.tensor([1, 0], dtype=weights.dtype))
    assert torch.allclose(weights[[1, 2, 5]], torch.tensor(0.5, dtype=weights.dtype), atol=0.01)
    assert ids[[3, 5]].tolist() == [[0, 1]] * 2
    assert weights.isfinite().all()
    assert y[[0, 1, 2, 5]].isfinite().all()
    for got, before in zip((y, weights, ids), ordinary):
        assert torch.equal(got[6:], before[6:]), "a bad row changed its neighbours"


@pytest.mark.parametrize("tokens", [7, 40, 100, 150, 1300])
def test_same_bits_on_any_number_of_threads(tokens):
    p = Problem.random(tokens, 768, 768, 8, 32, 16, 2)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(extension.apply(*p.arguments()[:7], *extension.route(p.x, p.rows(), 2), True))
    torch.set_num_threads(before)
    for y, h in results[1:]:
        assert torch.equal(h, results[0][1])
        # For many tokens the base product is PyTorch's, whose order of summation may depend on the number of threads.
        assert tokens > 64 or torch.equal(y, results[0][0])
        assert_close("y", y, results[0][0].double(), 1e-6)


def test_same_gradients_on_any_number_of_threads():
    p = Problem.random(70, 300, 200, 8, 32, 16, 2)
    y, weights, ids, h = COMPILED.linear(*p.arguments(), 2, 16, True)
    dy, before, results = torch.randn_like(y), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        layer = COMPILED.apply_backward(dy, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h, 0b11111000)
        results.append([*layer, *COMPILED.route_backward(layer[7], p.x, p.rows(), weights, ids, 3)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_python_threads_do_not_disturb_each_other():
    problems = [Problem.random(t, 96, 80, 4, 8, 4, 2, seed=t) for t in (1, 3, 40, 300)]
    want = [linear(p) for p in problems]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            if not all(torch.equal(a, b) for a, b in zip(linear(problems[i]), want[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "change", ["x", "vh", "s", "u", "expert_bias", "weight", "router", "router of fewer", "num_experts_per_tok"]
)
def test_what_does_not_fit_is_named(change):
    p = Problem.random(4, 24, 16, 3, 4, 2, 2, router=True)
    if change == "num_experts_per_tok":
        p.num_experts_per_tok = 4
    elif change == "s":
        p.s = p.s.double()
    elif change == "router of fewer":
        p.router = p.router[:-1]
    else:
        setattr(p, change, getattr(p, change)[..., :-1])
    with pytest.raises(RuntimeError, match=change.split()[0] if change not in ("x", "weight") else "router|weight"):
        linear(p)


def test_layers_without_features_outputs_or_experts_are_refused():
    p = Problem.random(13, 6, 5, 3, 2, 2, 1)
    (x, weight, bias, vh, s, u, _, _), (weights, ids) = p.arguments(), linear(p)[1:3]
    for given, message in (
        ((x[:, :0], weight[:, :0], bias, vh[..., :0], s, u), "x: has 0 features"),
        ((x, weight[:0], bias[:0], vh, s, u[:, :0]), "u: has 3 experts and 0 outputs"),
        ((x, weight, bias, vh[:0], s[:0], u[:0]), "u: has 0 experts and 5 outputs"),
    ):
        with pytest.raises(RuntimeError, match=message):
            COMPILED.apply(*given, None, weights, ids, False)
        dy, h = torch.zeros(13, given[5].shape[1]), torch.zeros(13, 1, 2)
        x_, w_, _, *experts = given
        with pytest.raises(RuntimeError, match="expected 1 or more"):
            COMPILED.apply_backward(dy, x_, w_, *experts, None, weights, ids, h, 0xFF)


@pytest.mark.parametrize("tokens", [64, 200])
def test_sums_of_one_sign_over_many_columns(tokens):
    """Their rounding errors add up; those of plain PyTorch are the measure, as everywhere."""
    p = Problem.random(tokens, 28672, 50, 2, 3, 2, 1)
    p.x, p.weight = p.x.relu(), p.weight + p.weight.std()
    y, weights, ids, _ = linear(p)
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"])


@pytest.mark.parametrize("tokens", [8, 64, 200])
def test_shrink_products_of_one_sign_over_many_columns(tokens):
    p = Problem.random(tokens, 28672, 8, 2, 6, 2, 2)
    p.x, p.vh = p.x.relu(), p.vh + p.vh.std()
    _, _, ids, h = linear(p, save=True)
    own = ids.long()[..., None].expand(-1, -1, 6)
    plain = torch.nn.functional.linear(p.x, p.vh.flatten(0, 1)).view(tokens, 2, 6).gather(1, own)
    want = torch.einsum("td,nrd->tnr", p.x.double(), p.vh.double()).gather(1, own)
    assert_close("h", h, want, (plain - want).abs().max())


def test_gradients_of_one_sign_over_many_tokens():
    """Their errors are those of PyTorch's sums, not of one chain of additions."""
    p, tokens = Problem.random(1, 16, 12, 1, 4, 2, 1), 20000
    x, dy = p.x.abs().expand(tokens, -1).contiguous(), torch.full((tokens, 12), 0.1)
    vh, u, ids = p.vh.abs(), p.u.abs(), torch.zeros(tokens, 1, dtype=torch.int32)
    weights, h = torch.ones(tokens, 1), (x @ vh[0].T).unsqueeze(1)
    arguments = dy, x, p.weight, vh, p.s, u, p.expert_bias, weights, ids, h
    ds, _, dexpert_bias = COMPILED.apply_backward(*arguments, 0xFF)[4:7]
    want = dy.double().sum(0)
    assert_close("dexpert_bias", dexpert_bias[0], want, (dy.sum(0) - want).abs().max())
    a = dy @ u[0]
    want = (a.double() * h[:, 0].double()).sum(0)
    assert_close("ds", ds[0], want, ((a * h[:, 0]).sum(0) - want).abs().max())


def test_other_leading_dimensions_are_refused():
    p = Problem.random(6, 16, 24, 4, 4, 4, 2)
    (x, *layer), routing = p.arguments(), linear(p)[1:3]
    with pytest.raises(RuntimeError, match=r"ids: has shape \[6, 2\]; expected \[2, 3, 2\]"):
        COMPILED.apply(x.view(2, 3, 16), *layer[:6], *routing, False)
    with pytest.raises(RuntimeError, match="x: has 6 dimensions; expected 1 to 5"):
        COMPILED.linear(x.view(1, 1, 1, 2, 3, 16), *layer, 2, 4, False)
    with pytest.raises(RuntimeError, match="x: has 0 dimensions"):
        COMPILED.linear(x[0, 0], *layer, 2, 4, False)
    y = COMPILED.linear(x[0], *layer, 2, 4, False)[0]
    assert y.shape == (24,)
    assert_close("y", y, linear(p)[0][0].double(), 1e-6)


def test_ids_out_of_range_are_refused():
    p = Problem.random(4, 24, 16, 3, 4, 2, 2)
    for bad in (3, -2):
        ids = torch.tensor([[0, 1]] * 3 + [[0, bad]], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=f"ids: contains {bad}; expected 0 to 2, or -1 for no expert"):
            extension.apply(*p.arguments()[:7], torch.rand(4, 2), ids, False)


@pytest.mark.parametrize("tokens", [6, 90])
def test_an_id_of_minus_one_is_no_expert(tokens):
    p = Problem.random(tokens, 24, 70, 3, 4, 2, 2)
    weights, ids = extension.route(p.x, p.rows(), 2)
    absent = torch.rand(tokens, 2) < 0.3
    absent[1] = True
    ids[absent], weights[absent] = -1, float("nan")
    y, h = extension.apply(*p.arguments()[:7], weights, ids, True)
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"])
    assert not h[absent].any()


def test_opcheck():
    p = Problem.random(5, 24, 16, 3, 4, 2, 2)
    linear(p)
    ops = torch.ops.smile_kernels_ext
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.route.default, (p.x, p.rows(), 2), test_utils=utils)
    for save in (False, True):
        torch.library.opcheck(ops.linear.default, (*p.arguments(), 2, 2, save), test_utils=utils)
        routing = ops.route(p.x, p.rows(), 2)
        torch.library.opcheck(ops.apply.default, (*p.arguments()[:7], *routing, save), test_utils=utils)
        y, experts = torch.randn(5, 16), (p.x, p.vh, p.s, p.u, p.expert_bias, p.router)
        for given in ((None, None), routing):
            torch.library.opcheck(ops.delta.default, (y, *experts, *given, 2, 2, save), test_utils=utils)
            torch.library.opcheck(ops.delta_.default, (y, *experts, *given, 2, 2, save), test_utils=utils)


def test_opcheck_of_parts():
    problems = problems_of_parts((5, 3), (4, 2), 6, 24, 3, 2, 2)
    x, layer, ops = problems[0].x, side_by_side(problems, (4, 2)), torch.ops.smile_kernels_ext
    layer, parts = {name: None if t is None else t.nan_to_num() for name, t in layer.items()}, ((5, 3), (4, 2))
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.linear.default, (x, *layer.values(), 2, 2, True, *parts), test_utils=utils)
    _, weights, ids, _ = ops.linear(x, *layer.values(), 2, 2, False, *parts)
    arguments = x, *list(layer.values())[:6]
    torch.library.opcheck(ops.apply.default, (*arguments, weights, ids, True, *parts), test_utils=utils)
    with pytest.raises(RuntimeError, match="parts: have 8 outputs together; expected those of u, 5"):
        ops.linear(x, *{**layer, "u": layer["u"][:, :5], "expert_bias": None}.values(), 2, 2, False, *parts)
    with pytest.raises(RuntimeError, match="rank_of_parts: contains 5; expected 0 to 4"):
        ops.linear(x, *layer.values(), 2, 2, False, (5, 3), (4, 5))
    for wrong in ((-1, 9), (2**62, 8 - 2**62), (0, 8)):
        with pytest.raises(RuntimeError, match=f"parts: contains {wrong[0]}; expected 1 to 8"):
            ops.linear(x, *layer.values(), 2, 2, False, wrong, (4, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 20, 100, 300])
def test_parts_without_experts(tokens, dtype):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((tokens, 24), (90, 24), (90,)))
    vh, s, u = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((2, 3, 4, 24), (2, 3, 4), (3, 90, 4)))
    s = s.to(torch.promote_types(dtype, torch.float32))
    y, weights, ids, _ = COMPILED.linear(x, weight, bias, vh, s, u, None, None, 2, 2, False, (20, 70), (0, 0))
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_close("y", y, exact, (F.linear(x, weight, bias) - exact).abs().max().item())
    assert (ids == -1).all()
    assert not weights.any()


@pytest.mark.parametrize("past", [-1, 3, 2**63 - 2, 2**63 - 1])
def test_sums_are_written_within_their_buffer(past):
    p = Problem.random(4, 24, 16, 3, 4, 2, 2)
    sums = torch.zeros(2, 4, 3)
    with pytest.raises(RuntimeError, match=f"past: is {past} before 2 tokens; expected space for them in sums"):
        COMPILED.evidence_linear(*p.arguments(), None, None, None, sums, past, None, 2, 2, 2, 1, True)
    assert not sums.any()


def test_same_bits_of_parts_on_any_number_of_threads():
    problems = problems_of_parts((300, 70, 130), (16, 0, 9), 70, 300, 8, 16, 2)
    layer, before, results = side_by_side(problems, (16, 0, 9)), torch.get_num_threads(), []
    y = torch.randn(70, 500)
    experts = problems[0].x, *list(layer.values())[2:]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(COMPILED.delta(y, *experts, None, None, 2, 16, True, (300, 70, 130), (16, 0, 9)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_library_of_older_sources_is_named(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    for training in (False, True):
        assert "built from older sources" in extension.why_not("cpu", torch.float32, 4, training=training)


@pytest.mark.parametrize("training", [False, True])
def test_layer_uses_it(training):
    assert sk.ops.library.choose_backend(None, "cpu", torch.float32, 4, training=training) == "cpu"


def test_layer_whose_parameter_is_computed():
    class Double(torch.nn.Module):
        def forward(self, s):
            return 2 * s

    layer, x = sk.SmileLinear(24, 16, 3, 4, 2), torch.randn(5, 24)
    torch.nn.utils.parametrize.register_parametrization(layer, "s", Double())
    with torch.no_grad():
        got = layer(x)
        torch.nn.utils.parametrize.remove_parametrizations(layer, "s")
        assert torch.equal(got, layer(x))


@pytest.mark.exhaustive  # it compiles for 90 seconds; the other tests poison memory too
def test_clean_under_sanitizers():
    """AddressSanitizer and UBSan find nothing on each instruction set of this machine."""
    assert run_sanitized(cpu_library(*SANITIZERS), "cpu").split()[-1] == "clean"


def test_vmap_and_autocast_of_the_operators_themselves():
    p = Problem.random(6, 24, 16, 3, 4, 2, 2)
    op = torch.ops.smile_kernels_ext.linear.default
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where an operator has no rule
        mapped = torch.func.vmap(lambda x: op(x[None], *p.arguments()[1:], 2, 2, True))(p.x)
    for got, want in zip(mapped, linear(p, save=True)):
        torch.testing.assert_close(got[:, 0], want)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(*p.arguments(), 2, 2, False)[0]
    assert torch.equal(y, linear(p)[0]), "autocast changed the arithmetic inside"
