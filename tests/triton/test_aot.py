"""The kernels compile for devices that are not here: no spills, shared memory within limits, tensor cores, wide loads.

resources.json holds what each kernel uses; `python tests/triton/aot.py --write` renews it where a change is meant.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
RESOURCES = json.loads((HERE / "resources.json").read_text())
SHARED = {"sm80": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376, "gfx942": 65536}
DEVICES = list(SHARED)


@functools.cache
def compiled(device: str, *options: str) -> dict[str, dict]:
    """What each kernel compiled for `device` uses. Triton cannot compile in a process in which it interprets."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, HERE / "aot.py", *options, device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {key: used for line in done.stdout.splitlines() for key, used in json.loads(line).items()}


def check(device: str, kernels: dict[str, dict]) -> None:
    for key, used in kernels.items():
        assert used["spilled"] == 0, (key, used)
        assert used["shared"] <= SHARED[device], (key, used)
        if device == "gfx942":
            continue
        products = used["in loops"]
        if "PRECISION=ieee" in key and "float32" in key:
            assert not {"HGMMA", "UTCMMA", "HMMA"} & used.keys(), f"{key}: a float32 product is not exact: {used}"
        # Rows of x, of the weight and of the factors come 16 bytes a load, ahead of the products that use them.
        if key.split()[1] in ("shrink._shrink", "decode._decode") or "BASE=True" in key:
            assert "UTMALDG" in used or used.get("LDGSTS.128", 0) >= 0.8 * used["LDGSTS"] > 0, (key, used)
            assert products, (key, used)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_fit_the_device(device):
    check(device, compiled(device))


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", DEVICES)
def test_every_tile_fits_the_device(device):
    check(device, compiled(device, "--exhaustive"))


@pytest.mark.parametrize(("device", "instruction"), [("sm80", "HMMA"), ("sm90", "HGMMA"), ("sm100", "UTCMMA")])
def test_prefill_runs_on_the_tensor_cores(device, instruction):
    prefill = {k: v for k, v in compiled(device).items() if "expand._expand" in k and "BLOCK_T=128" in k}
    assert prefill
    assert all(instruction in used["in loops"] for k, used in prefill.items()), prefill


def test_launches_that_depend_on_another_overlap_it_where_the_device_can():
    """A kernel that starts early waits for what it depends on, and the one before it lets it start."""
    for device, overlap in (("sm80", 0), ("sm90", 1)):
        kernels = {key.split(" ", 1)[1]: used for key, used in compiled(device).items()}
        for start in ("shrink._shrink", "route._route", "expand._expand", "decode._decode bfloat16 EXPAND=True"):
            chosen = [used for key, used in kernels.items() if key.startswith(start)]
            assert chosen
            assert all(used.get("griddepcontrol", 0) >= overlap for used in chosen), (device, start, chosen)
            assert overlap or not any("griddepcontrol" in used for used in chosen), (device, start, chosen)


@pytest.mark.parametrize("device", DEVICES)
def test_resources_are_those_on_record(device):
    if triton.__version__ != RESOURCES["triton"]:
        pytest.skip(f"resources.json is of Triton {RESOURCES['triton']}, this is {triton.__version__}")
    recorded = {key: used for key, used in RESOURCES["kernels"].items() if key.split()[0] == device}
    assert compiled(device) == recorded, "renew with `python tests/triton/aot.py --write` if this change is meant"
