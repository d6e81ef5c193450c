"""The registered operators and the choice of a backend."""

import pytest
import torch

import smile_kernels as sk
from smile_kernels.ops import extension, library, reference
from tests.problems import ON_CPU, call, problem


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", ["top-1", "top-2"])
def test_operators_pass_opcheck(shape, backend):
    p = problem(shape)
    args = p.arguments()
    weights, ids = reference.route(p.x, p.rows(), p.num_experts_per_tok)
    ops = torch.ops.smile_kernels
    m, g = p.num_experts_per_tok, p.rank_of_router
    h = torch.randn(*ids.shape, p.s.shape[1])
    x, weight, _, vh, s, u, expert_bias, _ = args
    dy = torch.randn(x.shape[0], weight.shape[0])
    cases = [
        (ops.route, (p.x, p.rows(), m)),
        (ops.linear, (*args, m, g, True)),
        (ops.linear, (*args, m, g, False)),
        (ops.apply, (*args[:7], weights, ids, True)),
        (ops.route_backward, (torch.randn_like(weights), x, p.rows(), weights, ids, [True, False])),
        (ops.apply_backward, (dy, x, weight, vh, s, u, expert_bias, weights, ids, h, [True, False] * 4)),
        (ops.linear_backward, (dy, x, weight, vh, s, u, expert_bias, None, weights, ids, h, g, [True, False] * 4)),
        (ops.delta, (dy, x, vh, s, u, expert_bias, None, None, None, m, g, True, [], [])),
        (ops.delta_, (dy, x, vh, s, u, expert_bias, None, weights, ids, m, g, False, [], [])),
        (
            ops.delta_backward,
            (dy, x, vh, s, u, expert_bias, None, weights, ids, h, g, True, [True, False] * 3 + [False], [], []),
        ),
    ]
    parts, ranks = (3, weight.shape[0] - 3), (2, 0)
    vh, s, ids, weights = (
        torch.stack([vh, vh]),
        torch.stack([s, s]),
        ids[:, None].repeat(1, 2, 1),
        weights[:, None].repeat(1, 2, 1),
    )
    h = torch.randn(*ids.shape, s.shape[-1])
    for routing in ((None, None), (weights, ids)):
        arguments = dy, x, vh, s, u, expert_bias, None, *routing, m, g
        cases.append((ops.delta, (*arguments, False, parts, ranks)))
        cases.append((ops.delta_, (*arguments, True, parts, ranks)))
    backward = dy, x, vh, s, u, expert_bias, None, weights, ids, h, g
    cases.append((ops.delta_backward, (*backward, False, [True] * 5 + [False, True], parts, ranks)))
    for op, arguments in cases:
        torch.library.opcheck(op.default, (*arguments, backend))


def test_backend_choice(monkeypatch):
    cpu = "cpu", torch.float32, 4
    assert library.choose_backend("torch", *cpu, True) == "torch"
    with pytest.raises(ValueError, match="backend: 'fast' is unknown"):
        library.choose_backend("fast", *cpu, False)
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run here"):
        library.choose_backend("cuda", *cpu, False)
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "")
    assert library.choose_backend(None, *cpu, True) == ("cpu" if library.why_not("cpu", "cpu") is None else "torch")
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "torch")
    assert library.choose_backend(None, *cpu, False) == "torch"
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cannot run here"):
        call(problem("top-1"))
    assert call(problem("top-1"), backend="torch").shape == (33, 16)
    # Without Triton, a GPU uses the extension where supported, otherwise the composition.
    with monkeypatch.context() as patch:
        patch.setitem(library._MODULES, "triton", ".not_installed")
        patch.setattr(extension, "unavailable", lambda _: None)
        patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
        patch.delenv("SMILE_KERNELS_BACKEND")
        layers = [(torch.bfloat16, 256), (torch.float64, 4), (torch.float32, 257)]
        chosen = [library._choose.__wrapped__(None, "cuda", *layer, True) for layer in layers]
        assert chosen == ["cuda", "torch", "torch"]
        with pytest.raises(RuntimeError, match="'cuda' cannot run here: its kernels take up to 256 experts, not 257"):
            library._choose.__wrapped__("cuda", "cuda", *layers[2], True)
    assert sk.backends("cpu")["torch"] is None
    assert list(sk.backends()) == ["triton", "cuda", "cpu", "torch"]


def test_backends_of_a_device_are_those_of_its_type():
    for kind in ("cpu", "cuda"):
        for device in (torch.device(kind), f"{kind}:0", torch.device(kind, 0)):
            assert sk.backends(device) == sk.backends(kind)
    for wrong in ("", "gpu", "cpu:", "cpu:x", "\ud800", 0, 3, True, torch.nn.Linear(1, 1), torch.zeros(1), ["cpu"]):
        with pytest.raises(ValueError, match=r"^device_type: is .*; expected a torch\.device, or a type such as 'cpu'"):
            sk.backends(wrong)
