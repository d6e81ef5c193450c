"""The kernels compile for absent devices: no spills, shared memory within limits, tensor cores, wide loads.

resources.json has the resources of each kernel by version of Triton; `python tests/ops/triton/aot.py --write` updates
it after an intended change.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "resources.json").read_text()).get(triton.__version__)
SHARED = {"sm80": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376, "gfx942": 65536}
DEVICES = list(SHARED)


def compiled(which: str, *devices: str) -> dict[str, dict]:
    """Resources of the compiled kernels by device. Triton cannot compile in a process in which it interprets."""
    # The other process must find the same Triton.
    path = os.pathsep.join([str(HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, HERE / "aot.py", which, *devices]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {key: used for line in done.stdout.splitlines() for key, used in json.loads(line).items()}


def check(kernels: dict[str, dict]) -> None:
    assert kernels
    for key, used in kernels.items():
        device = key.split()[0]
        assert used["spilled"] == 0, (key, used)
        assert used["shared"] <= SHARED[device], (key, used)
        if device == "gfx942":
            continue
        if "PRECISION=ieee" in key and "float32" in key:
            assert not {"HGMMA", "UTCMMA", "HMMA"} & used.keys(), f"{key}: a float32 product is not exact: {used}"
        # Rows of x, of the weight and of the factors are loaded 16 bytes at a time, before the products that use them.
        if key.split()[1] in ("shrink._shrink", "decode._decode") or "BASE=True" in key:
            assert "UTMALDG" in used or used.get("LDGSTS.128", 0) >= 0.8 * used["LDGSTS"] > 0, (key, used)
            assert used["in loops"], (key, used)
        # A kernel that starts early waits for its inputs, and the previous one lets it start. Before the wait it reads
        # only the weight and other tensors that no kernel here wrote, and writes nothing.
        if "PDL=True" in key:
            assert used.get("griddepcontrol", 0) > 0, (key, used)
        if "late loads" in used:
            streams = "BASE=True" in key or "EXPAND=True" in key
            assert ("early loads" in used) == streams, (key, used)
            assert "early stores" not in used, (key, used)


def check_prefill(kernels: dict[str, dict]) -> None:
    """Tensor core instructions in the loops of prefill, and launches that overlap."""
    for device, matrix, overlaps in (
        ("sm80", "HMMA", False),
        ("sm90", "HGMMA", True),
        ("sm100", "UTCMMA", True),
        ("sm120", "HMMA", True),
    ):
        own = {key: used for key, used in kernels.items() if key.split()[0] == device}
        prefill = {k: used for k, used in own.items() if "expand._expand bfloat16" in k and "BLOCK_T=128" in k}
        assert bool(prefill) == bool(own), device
        assert all(matrix in used["in loops"] for used in prefill.values()), prefill
        # All except for decode in one launch.
        alone = {key for key in own if "PDL=True" not in key and "SHRINK=True EXPAND=True" not in key}
        assert not alone if overlaps else alone == own.keys(), device


def check_recorded(kernels: dict[str, dict]) -> None:
    if RECORDED is not None:
        changed = {key: (used, RECORDED.get(key)) for key, used in kernels.items() if used != RECORDED.get(key)}
        assert not changed, "renew with `python tests/ops/triton/aot.py --write` if this change is meant"


def test_decode_and_prefill_fit_the_devices_and_use_them():
    kernels = compiled("usual", "sm80", "sm90", "sm100")
    check(kernels)
    check_prefill(kernels)
    check_recorded(kernels)


@pytest.mark.exhaustive
def test_every_regime_fits_the_devices_and_uses_them():
    kernels = compiled("recorded", *DEVICES)
    check(kernels)
    check_prefill(kernels)
    check_recorded(kernels)
    assert RECORDED is None or kernels.keys() == RECORDED.keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", DEVICES)
def test_every_tile_fits_the_device(device):
    check(compiled("every", device))


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", ["sm80", "gfx942"])
def test_the_largest_layers_fit_the_device(device):
    check(compiled("extreme", device))


@pytest.mark.exhaustive
def test_another_process_finds_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = compiled("usual", "sm90")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.suffix == ".cubin" for path in files)
    assert compiled("usual", "sm90") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
