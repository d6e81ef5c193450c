"""The examples run as documented in their first lines, and print the documented output."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as a script in this process, since its imports take longer than the script; return its output."""

    def script(name: str) -> str:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_transformers_model(run):
    out = run("transformers_model.py")
    assert "layers: 14" in out
    assert re.search(r"tokens: \[(\d+, ){7}\d+\]", out)


def test_lora_experts(run):
    out = run("lora_experts.py")
    assert "11 of 14 layers upscaled" in out
    assert "logits: (1, 8, 200)" in out


def test_tensor_parallel():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "examples/tensor_parallel.py"],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = re.findall(r"rank (\d): (\d+) of (\d+) parameters, tokens (\[.*?\])", done.stdout)
    assert sorted(rank for rank, *_ in ranks) == ["0", "1"]
    assert ranks[0][3] == ranks[1][3]
    assert all(int(here) < 0.7 * int(whole) for _, here, whole, _ in ranks)


def test_quantized_base(run):
    pytest.importorskip("torchao", reason="torchao is not installed")
    out = run("quantized_base.py")
    assert "experts: torch.bfloat16 torch.float32" in out
    assert float(re.search(r"logits differ by ([\d.]+)%", out)[1]) < 5
