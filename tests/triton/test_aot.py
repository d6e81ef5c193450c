"""The kernels compile for devices that are not here: no spills, shared memory within limits, tensor cores, wide loads.

resources.json holds what each kernel uses; `python tests/triton/aot.py --write` renews it where a change is meant.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

# Minutes of compiling, and figures that belong to one version of Triton: run by `make test-all`.
pytestmark = pytest.mark.exhaustive

HERE = Path(__file__).parent
RESOURCES = json.loads((HERE / "resources.json").read_text())
SHARED = {"sm80": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376, "gfx942": 65536}
DEVICES = list(SHARED)


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
        if "PRECISION=ieee" in key and "float32" in key:
            assert not {"HGMMA", "UTCMMA", "HMMA"} & used.keys(), f"{key}: a float32 product is not exact: {used}"
        # Rows of x, of the weight and of the factors come 16 bytes a load, ahead of the products that use them.
        if key.split()[1] in ("shrink._shrink", "decode._decode") or "BASE=True" in key:
            assert "UTMALDG" in used or used.get("LDGSTS.128", 0) >= 0.8 * used["LDGSTS"] > 0, (key, used)
            assert used["in loops"], (key, used)
        # A kernel that starts early waits for what it depends on, and the one before it lets it start.
        if "PDL=True" in key:
            assert used.get("griddepcontrol", 0) > 0, (key, used)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_fit_the_device_and_use_it(device):
    kernels = compiled(device)
    check(device, kernels)
    matrix = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCMMA", "sm120": "HMMA"}.get(device)
    if matrix:
        prefill = {k: used for k, used in kernels.items() if "expand._expand" in k and "BLOCK_T=128" in k}
        assert prefill
        assert all(matrix in used["in loops"] for used in prefill.values()), prefill
        overlapped = {k.split()[1] for k in kernels if "PDL=True" in k}
        chain = {"shrink._shrink", "route._route", "expand._expand", "decode._decode"}
        assert overlapped == (set() if device == "sm80" else chain)
    if triton.__version__ == RESOURCES["triton"]:
        recorded = {key: used for key, used in RESOURCES["kernels"].items() if key.split()[0] == device}
        assert kernels == recorded, "renew with `python tests/triton/aot.py --write` if this change is meant"


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", DEVICES)
def test_every_tile_fits_the_device(device):
    check(device, compiled(device, "--exhaustive"))
