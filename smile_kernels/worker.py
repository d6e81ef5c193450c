"""A child process for work that may crash or hang, such as kernels that never ran on a device."""

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
    """The return value of `work`, or the reason of a failure."""

    result: Any
    failure: str | None = None


class Worker:
    """Runs `work(job)` in a child process, one job at a time; a child that died is replaced for the next job.

    Args:
        work: a function that the child can import, called with one argument; argument and result are pickled.
        start_seconds: time limit for the child to start and import `work`.
    """

    def __init__(self, work: Callable[[Any], Any], start_seconds: float = 120.0) -> None:
        self._work, self._start_seconds = work, start_seconds
        self._process: BaseProcess | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, job: Any, seconds: float) -> Outcome:
        """The outcome of one job. A failure begins with "wrong" (AssertionError), "raised", "hung" or "died".

        Raises:
            OSError: no process can be started here, which says nothing of the job.
        """
        started = self._process is not None
        if not started:
            self._start()
        try:
            if not started and not (self._connection.poll(self._start_seconds) and self._connection.recv() is None):
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

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        try:
            self._connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
            process.start()
        except OSError as error:
            raise OSError(
                error.errno,
                f"no child process can be started ({error.strerror}); expected memory and descriptors for one",
            ) from None
        self._process = process
        theirs.close()

    def close(self) -> int | None:
        """End the child and its descendants; return its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        self._connection.close()
        process.join(0.2)  # a child that is already ending keeps its exit status
        if process.is_alive():
            try:
                assert process.pid is not None
                os.killpg(process.pid, signal.SIGKILL)  # the child leads its own process group
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
    """Give each job to the next free worker and report each outcome.

    Args:
        workers: run the jobs in parallel.
        jobs: started in this order.
        seconds: time limit for a job, after which it counts as hung.
        deadline: value of `time.monotonic`; jobs that have not ended by then are not reported.
        report: called with each job and its outcome, one at a time.
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
        except Exception as error:  # an exception is the job's outcome; the other jobs continue
            outcome = Outcome(None, f"raised {type(error).__name__}: {error}"[:2000])
        lost = outcome.failure is not None and not _device_answers()
        connection.send((outcome, lost))
        if lost:
            return


def _device_answers() -> bool:
    """False after an error on the GPU that makes every later call in this process fail."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False
