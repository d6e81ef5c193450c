"""Paths that failed `smile-kernels doctor --verify` on this machine; the automatic choice excludes them.

The record is one JSON file for each user: machine -> path -> reason. It is valid for one device and one version of this
package, of PyTorch and of Triton.
"""

import functools
import json
import platform
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import SmileError
from ..publishing import read_user_file, user_file, write_text
from ..versions import installed

_FILE = "XDG_CACHE_HOME", ".cache", "excluded.json"


def file() -> Path:
    """$XDG_CACHE_HOME/smile_kernels/excluded.json, by default under ~/.cache."""
    return user_file(*_FILE)


def device_name(device_type: str) -> str:
    """Name of the device; for "cuda" that of the current GPU."""
    if device_type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def machine(device: str) -> str:
    """The key of the record: the device's name and versions."""
    versions = [f"{name} {installed(name) or 'not installed'}" for name in ("smile-kernels", "torch", "triton")]
    return "; ".join([device, *versions])


def name_of(backend: str, part: str, dtype: torch.dtype, training: bool) -> str:
    """The name of a path. `part` is the failed kernel or launch path; "" is the whole backend."""
    kind = "training" if training else "inference"
    return " ".join(filter(None, [backend, part, str(dtype).removeprefix("torch."), kind]))


@functools.cache
def paths(device: str) -> Mapping[str, str]:
    """Excluded path -> reason, for a device name. Read once, with a warning about excluded paths."""
    found = _read().get(machine(device), {})
    if found:
        listed = "; ".join(f"{name}: {reason}" for name, reason in found.items())
        warnings.warn(
            f"smile_kernels excludes paths that failed `smile-kernels doctor --verify` on {device}: {listed}. "
            "`smile-kernels doctor` lists it, `smile-kernels doctor --forget` undoes it.",
            stacklevel=2,
        )
    return found


def why_excluded(backend: str, device_type: str, dtype: torch.dtype, training: bool, operator: str = "") -> str | None:
    """Why the automatic choice excludes an operator of a backend, "" for all of them; None if it does not."""
    if device_type not in ("cpu", "cuda"):
        return None
    found = paths(device_name(device_type))
    kinds = (False, True) if training else (False,)
    return next(filter(None, (found.get(name_of(backend, operator, dtype, kind)) for kind in kinds)), None)


def record(device: str, reasons: Mapping[str, str]) -> None:
    """Set the excluded paths of a device name; {} excludes none."""
    content = _read(replaces=True)
    content.pop(machine(device), None)
    when = time.strftime("%Y-%m-%d", time.gmtime())
    if reasons:
        content[machine(device)] = {name: f"{reason} ({when})" for name, reason in reasons.items()}
    file().parent.mkdir(parents=True, exist_ok=True)
    write_text(file(), json.dumps(content, indent=1, sort_keys=True) + "\n")
    paths.cache_clear()


def _read(replaces: bool = False) -> dict[str, dict[str, str]]:
    text = read_user_file(*_FILE, replaces=replaces)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        if all(isinstance(reasons, dict) for reasons in content.values()):
            return content
        problem = "its values are not objects"
    except (ValueError, AttributeError, RecursionError) as error:
        problem = str(error)
    raise SmileError(f"{file()}: is not a record of excluded paths ({problem}); delete it")
