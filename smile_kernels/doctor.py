"""`doctor`: versions, devices and backends of this machine, and the selftest of `--verify`."""

import itertools
import json
import os
import platform
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, selftest
from .benchmark.measure import machine
from .console import progress
from .ops import excluded, library
from .publishing import marked, write_text
from .versions import TESTED, installed, newer_than_tested, tested
from .worker import Worker


def verify(device_types: tuple[str, ...], report: Path | None, console: Console) -> bool:
    """Run the selftest, write its results and the excluded paths; return whether anything failed."""
    results: dict[str, dict[str, Any]] = {}
    left_out, failed = {}, 0
    with progress() as advance:
        for device_type in device_types:
            todo, done = selftest.checks(device_type), itertools.count(1)

            def report_one(*_: Any, stage: str = f"verify {device_type}", done: Any = done, n: int = len(todo)) -> None:
                advance(stage, next(done), n)

            count = min(8, os.cpu_count() or 1) if device_type == "cuda" else 1
            with ExitStack() as stack:
                workers = [stack.enter_context(Worker(selftest.perform)) for _ in range(count)]
                outcomes = selftest.verify(todo, workers, report=report_one)
            left_out[device_type] = selftest.blamed(todo, outcomes)
            checks = [selftest.as_record(check, outcomes[check.name]) for check in todo]
            results[device_type] = {"machine": machine(device_type), "checks": checks}
            failed += sum(check["failure"] is not None for check in checks)
    file = report or excluded.file().with_name("verify.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(marked(results), indent=1) + "\n")
    for device_type, reasons in left_out.items():
        excluded.record(excluded.device_name(device_type), reasons)
    for device_type, result in results.items():
        wrong = [check for check in result["checks"] if check["failure"] is not None]
        total = len(result["checks"])
        console.print(
            f"{device_type}: {total - len(wrong)} of {total} checks agree with the reference", highlight=False
        )
        for check in wrong:
            console.print(f"  {check['name']}: {check['failure']}", markup=False, highlight=False, soft_wrap=True)
    said = "attach it to a bug report" if failed else "written"
    console.print(f"{file}: {said}", markup=False, highlight=False, soft_wrap=True)
    return failed > 0


def show_machine(console: Console) -> None:
    """Versions and devices."""
    versions = Table(
        "package", "version", "tested with", box=None, pad_edge=False, title="versions", title_justify="left"
    )
    versions.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    versions.add_row("smile-kernels", __version__)
    for package in TESTED:
        newer = " (this one is newer)" if newer_than_tested(package) else ""
        versions.add_row(package, installed(package) or "not installed", tested(package) + newer)
    console.print(versions, "")

    devices = Table("device", "description", box=None, pad_edge=False, title="devices", title_justify="left")
    devices.add_row("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        devices.add_row(f"cuda:{i}", f"{p.name}, {memory}, {p.multi_processor_count} SMs, sm_{p.major}{p.minor}")
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        devices.add_row("cuda", f"not available: torch {torch.__version__} is built with {build}")
    console.print(devices, "")


def show_backends(device_type: str, console: Console) -> None:
    """The backend chosen on each device, why the others cannot run, and the paths excluded by --verify."""
    table = Table(
        "backend",
        "on " + device_type,
        box=None,
        pad_edge=False,
        title=f"backends on {device_type}",
        title_justify="left",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # excluded paths are shown below
        left_out = excluded.paths(excluded.device_name(device_type))
        try:
            chosen = library.choose_backend(None, device_type, torch.float32, 1, False)
        except (RuntimeError, ValueError) as error:
            chosen = None
            console.print(f"SMILE_KERNELS_BACKEND={os.environ.get('SMILE_KERNELS_BACKEND')}: {error}", markup=False)
    for backend, reason in library.backends(device_type).items():
        table.add_row(backend, reason or ("would run" if backend == chosen else "can run"))
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if left_out:
        console.print("`smile-kernels doctor --forget` enables it again", markup=False, highlight=False)
