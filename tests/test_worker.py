"""The child process for work that raises, is wrong, hangs or dies: only one job is lost."""

import errno
import multiprocessing.popen_spawn_posix
import os
import subprocess
import sys
import time

import pytest

from smile_kernels.worker import Outcome, Worker, run_all


def work(job):
    if job == "wrong":
        raise AssertionError("2 is not 3")
    if job == "raise":
        raise ValueError("planted")
    if job == "die":
        os._exit(3)
    if job == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        with open(os.environ["PLANTED"], "w") as file:
            file.write(str(child.pid))
        time.sleep(1000)
    return os.getpid(), job


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_what_fails_is_named_and_the_next_job_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "pid"))
    with Worker(work) as worker:
        first = worker("a", 60).result[0]
        assert worker("wrong", 60) == Outcome(None, "wrong: 2 is not 3")
        assert worker("raise", 60) == Outcome(None, "raised ValueError: planted")
        assert worker("b", 60) == Outcome((first, "b"))  # the same process
        assert worker("hang", 3) == Outcome(None, "hung: no answer within 3 s")
        assert gone(first)
        if sys.platform == "linux":
            assert gone(int((tmp_path / "pid").read_text()))  # also its children
        assert worker("die", 60) == Outcome(None, "died: exit status 3")
        last = worker("c", 60).result[0]
        assert last != first
    assert gone(last)


def test_a_process_that_cannot_be_started_is_no_failure_of_the_job(monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.popen_spawn_posix.Popen, "__init__", refused)
    with Worker(work) as worker, pytest.raises(OSError, match="no child process can be started"):
        worker("a", 60)


def unable(job):
    raise AssertionError("is never reached")


def test_a_process_that_does_not_start_in_time_is_named():
    with Worker(unable, start_seconds=0.0) as worker:
        assert worker("a", 60).failure == "hung: the process did not start within 0 s"


def test_jobs_are_shared_and_none_begins_after_the_deadline(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setenv("PLANTED", str(tmp_path / "pid"))
    with Worker(work) as one, Worker(work) as other:
        options = {"seconds": 60, "report": lambda job, outcome: found.setdefault(job, outcome.result)}
        run_all([one, other], list("abcdef"), deadline=time.monotonic() + 60, **options)
        assert found.keys() == set("abcdef")
        found.clear()
        run_all([one, other], ["a"], deadline=time.monotonic() - 1, **options)
        assert found == {}
        run_all([one], ["hang", "a"], deadline=time.monotonic() + 3, **options)
    assert found == {}  # ended by the deadline: whether it hung is unknown


@pytest.mark.parametrize("jobs", [[], ["a"]])
def test_no_more_workers_start_than_there_are_jobs(jobs):
    with Worker(work) as one, Worker(work) as other:
        run_all([one, other], jobs, seconds=60, deadline=time.monotonic() + 60, report=lambda *_: None)
        assert other._process is None
