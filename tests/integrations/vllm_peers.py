"""The calls into vLLM's LoRA kernels that benchmarks make, under Triton's interpreter: `make test-vllm`.

vLLM's CPU build disables its Triton kernels; here a driver is reported to it, so that the functions of a GPU are called
with the arguments of the benchmarks.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.backends import backends
from triton.runtime import interpreter

backends["cpu"] = SimpleNamespace(driver=None)  # read when vllm.triton_utils is imported

from vllm.platforms import current_platform  # noqa: E402
from vllm.triton_utils import HAS_TRITON  # noqa: E402

from smile_kernels.benchmark import peers  # noqa: E402
from smile_kernels.benchmark.problems import Case, Setting  # noqa: E402
from smile_kernels.ops import reference  # noqa: E402
from smile_kernels.testing import assert_close, expectations  # noqa: E402


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    assert HAS_TRITON
    monkeypatch.setattr(type(current_platform), "num_compute_units", lambda *_: 4, raising=False)
    monkeypatch.setattr(peers, "_check_vllm", lambda problem: None)


def run(name: str, setting: Setting, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(y, the reference's y, plain PyTorch's error); the layer runs twice, on y poisoned by NaN in between."""
    problem = Case("280x160", setting, tokens, dtype).problem("cpu")
    problem.expert_bias = None
    weights, ids = reference.route(problem.x, problem.rows(), setting.num_experts_per_tok)
    layer, _ = peers.PEERS[name].build(problem, weights, ids)
    with torch.no_grad():
        layer(problem.x).fill_(torch.nan)
        y = layer(problem.x)
    return y, *expectations(problem, ids, weights=weights)["y"]


@pytest.mark.parametrize("tokens", [1, 9, 150])
@pytest.mark.parametrize("setting", [Setting(4, 16, 5), Setting(3, 24, 5)], ids=str)
def test_lora(setting, tokens):
    assert_close("y", *run("vllm.lora", setting, tokens, torch.float16))


@pytest.mark.parametrize("tokens", [1, 9, 150])
@pytest.mark.parametrize(
    "setting", [Setting(4, 16, 5), Setting(16, 80, 5, 2), Setting(3, 24, 5, 2), Setting(3, 8, 5, 3)], ids=str
)
def test_moe_lora(setting, tokens):
    assert_close("y", *run("vllm.moe_lora", setting, tokens, torch.float16))


@pytest.mark.parametrize("tokens", [1, 9, 150])
@pytest.mark.parametrize("m", [1, 2])
def test_moe_lora_of_large_rank(tokens, m, monkeypatch):
    """Two kernels with bfloat16 operands, which the interpreter multiplies as raw bits."""

    def dot(self, a, b, d, *_):
        a, b = ((t.data.astype(np.uint32) << 16).view(np.float32) for t in (a, b))
        return interpreter.TensorHandle(a @ b + d.data, tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    y, want, _ = run("vllm.moe_lora", Setting(4, 144, 5, m), tokens, torch.float32)
    # x and vh, then h and u, are rounded to 8 bits; the experts' part is a tenth of y.
    assert ((y - want).norm(dim=1) < 2**-7 * want.norm(dim=1)).all()
