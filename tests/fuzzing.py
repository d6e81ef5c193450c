"""Fuzzing: hypothesis draws the cases; each is limited in time and memory, most in a separate process."""

import os
import resource
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from smile_kernels import SmileError

SECONDS, BYTES = 60, 2 << 30  # of wall time, on a loaded machine; of memory in addition to that of the tests


def fuzzed(few: int, many: int) -> Callable[[Callable], Callable]:
    """A test with hypothesis' settings as argument `examples`: few fixed cases, or many random ones (exhaustive)."""
    common: dict[str, Any] = {"deadline": None, "database": None, "phases": (Phase.generate, Phase.shrink)}
    common["suppress_health_check"] = [*HealthCheck]
    seeded = settings(max_examples=few, derandomize=True, **common)
    random = settings(max_examples=many, print_blob=True, **common)
    cases = [pytest.param(seeded, id="seeded"), pytest.param(random, id="random", marks=pytest.mark.exhaustive)]
    return pytest.mark.parametrize("examples", cases)


def outcome(job: Callable[[], object]) -> str:
    """The outcome of a job in a separate process: "success", the type of a user error, or "fault: ..."."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.write(write, _run(job).encode())
        os._exit(0)
    os.close(write)
    try:
        late = not select.select([read], [], [], SECONDS)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        result = os.read(read, 1 << 16).decode(errors="replace")
    finally:
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if late:
        return f"fault: did not end in {SECONDS} s"
    return result or f"fault: the process ended with {status}"


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """Limits this process in time and memory: exceeding them raises."""

    def late(*_: object) -> None:
        raise TimeoutError(f"did not end in {seconds} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    _limit_memory()
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _limit_memory() -> None:
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _run(job: Callable[[], object]) -> str:
    _limit_memory()
    sys.setrecursionlimit(1000)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job()
        return "success"
    except (SmileError, OSError) as error:
        return type(error).__name__ if str(error).strip() else f"fault: {error!r} says nothing"
    except BaseException as error:
        return f"fault: {error!r}"[:2000]
