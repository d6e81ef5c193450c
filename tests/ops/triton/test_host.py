"""Launches as made by the host: see host_checks.py, which runs here in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smile_kernels.ops.triton import decode

CHECKS = [
    "a_kernel_is_compiled_once_for_all_calls",
    "kept_launches_are_those_of_triton",
    "tensors_of_other_alignment_are_compiled_for",
    "settings_hold_from_the_next_call",
    "a_profiler_hears_of_every_launch",
    "a_triton_that_launches_otherwise_is_left_to_it",
    "the_first_launch_of_a_chain_does_not_overlap",
    "kept_launches_take_the_host_less_than_a_third_of_the_time",
]


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.ops.triton.host_checks"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_launches(check, found):
    assert found[check] is None, found[check]


def test_every_check_runs(found):
    assert list(found) == CHECKS


def test_counters_first_needed_in_a_capture_are_refused(monkeypatch):
    device = torch.device("cpu", 7)
    monkeypatch.setattr(decode, "_capturing", lambda _: True)
    decode.prepare(device)  # left to the first call
    with pytest.raises(RuntimeError, match="decode: its counters on cpu:7 are first needed while a CUDA graph"):
        decode.arrivals(device)
    monkeypatch.setattr(decode, "_capturing", lambda _: False)
    decode.prepare(device)
    monkeypatch.setattr(decode, "_capturing", lambda _: True)
    assert decode.arrivals(device).tolist() == [0, 0, 0, 0]
