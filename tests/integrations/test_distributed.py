"""Tensor parallelism and FSDP2 over gloo, on two and on four processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from smile_kernels.integrations.distributed import ColwiseSmile, tensor_parallel_plan

ROOT = Path(__file__).parents[2]


def test_the_same_as_in_one_process():
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.distributed_worker", "2", "4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def test_a_dense_layer_is_refused():
    with pytest.raises(ValueError, match="module: is a Linear; ColwiseSmile expects a SmileLinear"):
        ColwiseSmile()._apply(nn.Linear(4, 4), None)


def test_a_model_without_a_plan_is_refused():
    with pytest.raises(ValueError, match="model: Sequential has no tp_plan"):
        tensor_parallel_plan(nn.Sequential(nn.Linear(4, 4)))


def test_a_split_without_counterpart_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.tp_plan = {"0": "moe_tp_experts"}
    with pytest.raises(ValueError, match="tp_plan: 0 is 'moe_tp_experts'"):
        tensor_parallel_plan(model)
