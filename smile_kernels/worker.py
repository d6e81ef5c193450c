"""A child process for work that may crash or hang: a kernel that was never run, on a device that may not survive it."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch


class Outcome(NamedTuple):
    """What `work` returned, or why it returned nothing."""

    result: Any
    failure: str | None = None


class Worker:
    """Runs `work(job)` in a child process, one job after another; a child that is lost is replaced for the next job.

    Args:
        work: a function that the child can import, called with one argument; what goes in and out is pickled.
        start_seconds: how long the child may take to start and import `work`.
    """

    def __init__(self, work: Callable[[Any], Any], start_seconds: float = 120.0) -> None:
        self._work, self._start_seconds = work, start_seconds
        self._process: BaseProcess | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, job: Any, seconds: float) -> Outcome:
        """The outcome of one job. Its failure begins with "wrong" for an AssertionError, "raised", "hung" or "died"."""
        try:
            if self._process is None and not self._start():
                self.close()
                return Outcome(None, f"hung: the process did not start within {self._start_seconds:g} s")
            self._connection.send(job)
            if not self._connection.poll(max(seconds, 0.0)):
                self.close()
                return Outcome(None, f"hung: no answer within {seconds:g} s")
            outcome, lost = self._connection.recv()
        except (EOFError, OSError):
            return Outcome(None, f"died: exit status {self.close()}")
        if lost:
            self.close()
        return outcome

    def _start(self) -> bool:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        process.start()
        theirs.close()
        return self._connection.poll(self._start_seconds) and self._connection.recv() is None

    def close(self) -> int | None:
        """End the child and all that it started; its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        self._connection.close()
        process.join(0.2)  # one that is ending anyway has an exit status of its own
        if process.is_alive():
            try:
                assert process.pid is not None
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
            except OSError:
                process.kill()
        process.join(10)
        return process.exitcode


def run_all(
    workers: Sequence[Worker],
    jobs: Sequence[Any],
    *,
    seconds: float,
    deadline: float,
    report: Callable[[Any, Outcome], None],
) -> None:
    """Give each job to the next worker that is free, and report each outcome as it comes.

    Args:
        workers: what runs the jobs, side by side.
        jobs: in the order in which they begin.
        seconds: after which a job is ended as hung.
        deadline: on the clock of `time.monotonic`; what was not begun or has not ended by then is not reported.
        report: told of each job and its outcome, one at a time.
    """
    lock, waiting, done = threading.Lock(), iter(jobs), object()

    def serve(worker: Worker) -> None:
        while (left := deadline - time.monotonic()) > 0:
            with lock:
                job = next(waiting, done)
            if job is done:
                return
            outcome = worker(job, min(seconds, left))
            if left < seconds and outcome.failure is not None and outcome.failure.startswith("hung"):
                return
            with lock:
                report(job, outcome)

    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        list(pool.map(serve, workers[: len(jobs)]))


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    os.setsid()
    connection.send(None)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcome = Outcome(work(job))
        except AssertionError as error:
            outcome = Outcome(None, f"wrong: {error}"[:2000])
        except Exception as error:  # whatever a job raises is its outcome; the others go on
            outcome = Outcome(None, f"raised {type(error).__name__}: {error}"[:2000])
        lost = outcome.failure is not None and not _device_answers()
        connection.send((outcome, lost))
        if lost:
            return


def _device_answers() -> bool:
    """False after an error on the GPU that every later call in this process would raise again."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False
