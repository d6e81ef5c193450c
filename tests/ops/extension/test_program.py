"""A SMILE model in a C++ program without Python: the extension and an AOTInductor package."""

import subprocess
from pathlib import Path

import pytest
import torch

import smile_kernels as sk
from smile_kernels.ops import extension
from smile_kernels.testing import Problem, assert_close
from tests.ops.extension.builds import HERE, TORCH, cached


class Model(torch.nn.Module):
    """Two SMILE layers, one routed to one expert and one to two."""

    def __init__(self):
        super().__init__()
        self.problems = [Problem.random(1, 24, 40, 4, 8, 4, 1), Problem.random(1, 40, 16, 3, 4, 2, 2, router=True)]
        for layer, p in enumerate(self.problems):
            for name, tensor in p.tensors().items():
                self.register_buffer(f"{name}{layer}", tensor)

    def forward(self, x):
        for layer, p in enumerate(self.problems):
            tensors = [
                getattr(self, f"{name}{layer}", None)
                for name in ("weight", "bias", "vh", "s", "u", "expert_bias", "router")
            ]
            x = torch.tanh(
                sk.functional.smile_linear(
                    x, *tensors, num_experts_per_tok=p.num_experts_per_tok, rank_of_router=p.rank_of_router
                )
            )
        return x


@pytest.fixture(scope="module")
def model():
    return Model().eval()


@pytest.fixture(scope="module")
def program_of_model(model):
    tokens = torch.export.Dim("tokens", min=1, max=1024)
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(4, 24),), dynamic_shapes=({0: tokens},))


def test_exported_program_holds_the_compiled_operators(program_of_model):
    called = [str(node.target) for node in program_of_model.graph.nodes]
    assert called.count("smile_kernels_ext.linear.default") == 2
    assert not [name for name in called if name.startswith("smile_kernels.")]


def test_program_without_python_prints_the_same_numbers(model, program_of_model, tmp_path):
    package = torch._inductor.aoti_compile_and_package(program_of_model, package_path=str(tmp_path / "model.pt2"))
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    link = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    command = ["c++", "-std=c++20", "-O0", *includes, HERE / "program.cpp", *link, "-o"]
    executable = cached("program.out", command)
    linked = [line.split()[0] for line in subprocess.check_output(["ldd", executable], text=True).splitlines()]
    assert any(name.startswith("libtorch_cpu") for name in linked)
    assert not [name for name in linked if "python" in name]

    library = Path(extension.__file__).with_name("_extension_cpu.so")
    for tokens in (1, 7):
        x = torch.sin(torch.arange(tokens)[:, None] + torch.arange(24))
        with torch.no_grad():
            want = model(x)
        output = subprocess.check_output([executable, library, package, str(tokens), "24"], text=True, env={})
        got = torch.tensor([float(line) for line in output.split()]).view(want.shape)
        assert_close("y", got, want.double(), 1e-7)
