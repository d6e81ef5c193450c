"""All checks and measurements that need a GPU, in one call of less than ten minutes.

    python -m bench.gpu --out results                    # everything; ends within --seconds, 530 by default
    TRITON_INTERPRET=1 python -m bench.gpu --rehearse    # the same on a CPU with small shapes, without measurements
    python -m bench.gpu --sanitize                       # compute-sanitizer on a small case of each kernel

Everything on the GPU runs in child processes, which may crash or hang: these are named, and the rest continues.
Results are written when available, to triton.json under --out and in bench/results/<device>/; `python -m bench.report`
writes the tables of the documents. The call prints failures, headline and aims last, and ends with status 0.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from smile_kernels import selftest
from smile_kernels.benchmark.command import write_json
from smile_kernels.benchmark.measure import Record
from smile_kernels.benchmark.problems import Setting
from smile_kernels.worker import Outcome, Worker, run_all

from . import folder_of, gpu_tables
from .cost import LAYERS, SETTINGS
from .gpu_rows import Listing, Machine, Row, Soak, perform_job

ROOT = Path(__file__).parents[1]
HEADLINE_LAYERS = ("mistral-7b.q", "mistral-7b.up", "mistral-7b.down")
HEADLINE_TOKENS = (1, 16, 2048, 64, 512, 4, 128, 32, 256, 8192)  # most important first
PRINTED_BYTES = 9_000
# Latest end of each stage, as a share of the seconds of the call; time that a stage does not use is left for the rest.
ENDS = {
    "machine": 0.06,
    "paths": 0.19,
    "compile": 0.28,
    "headline": 0.47,
    "tests": 0.72,
    "cuda": 0.79,
    "settings": 0.93,
    "soak": 0.95,
    "single": 0.99,
}


@dataclass(frozen=True)
class Plan:
    """The settings of a run: on a GPU, or in a rehearsal."""

    device: str
    checks: Sequence[selftest.Check]
    headline: Sequence[Row]
    settings: Sequence[Row]
    single: Sequence[Row]
    tests: Sequence[str]
    build: Sequence[str] | None
    soak: Soak
    workers: int
    start_seconds: float  # most of a process's start
    check_seconds: float
    job_seconds: float
    single_seconds: float


def on_gpu() -> Plan:
    """First the headline, N8 r32 g16 top-1 of a 7-8B model's layers, then the other settings."""
    usual = SETTINGS[0]
    rows = [Row(la, usual, t, "graph", "cuda") for t in HEADLINE_TOKENS for la in HEADLINE_LAYERS]
    eager = [Row(la, usual, t, "eager", "cuda") for t in (1, 16, 64, 2048) for la in HEADLINE_LAYERS]
    trained = [Row("mistral-7b.q", usual, t, "training", "cuda") for t in (2048, 8192)]
    chosen = ("chosen",)
    kernels = [Row(la, usual, t, "kernels", "cuda", only=chosen) for t in (1, 16, 2048) for la in HEADLINE_LAYERS[:2]]
    others = [
        Row(la, setting, t, "graph", "cuda")
        for t, setting, la in product((1, 16, 64, 512, 2048), SETTINGS, LAYERS)
        if setting != usual or la not in HEADLINE_LAYERS
    ]
    others += [replace(trained[0], setting=setting) for setting in (SETTINGS[2], SETTINGS[4])]
    folder = ROOT / "tests" / "ops" / "triton"
    # Compiling ahead of time and the rehearsal need no GPU.
    without = {"test_gpu.py", "test_aot.py", "test_bench_gpu.py", "test_host.py"}  # the last three need no GPU
    files = [folder / "test_gpu.py", *sorted(f for f in folder.glob("test_*.py") if f.name not in without)]
    plugins = []
    if importlib.util.find_spec("xdist"):
        plugins += ["-n", "12"]
    if importlib.util.find_spec("pytest_timeout"):
        plugins += ["--timeout", "60"]
    return Plan(
        device="cuda",
        checks=selftest.checks("cuda"),
        headline=[*rows[:9], *eager[:6], *trained[:1], *rows[9:], *eager[6:], *trained[1:], *kernels],
        settings=others,
        single=[
            Row(la, usual, t, "graph", "cuda", only=("decode_one_launch fused",))
            for t in (1, 16)
            for la in HEADLINE_LAYERS
        ],
        tests=[*map(str, files), "-m", "not exhaustive", *plugins],
        build=["env", *build_for_this_gpu(), sys.executable, "setup.py", "build_ext", "--inplace"],
        soak=Soak("cuda", 15.0),
        workers=max(1, min(14, (os.cpu_count() or 1) - 2)),
        start_seconds=40.0,
        check_seconds=60.0,
        job_seconds=30.0,
        single_seconds=8.0,
    )


def build_for_this_gpu() -> list[str]:
    """Environment of setup.py: only this architecture, and an exit status that tells whether it was built."""
    major, minor = torch.cuda.get_device_capability()
    return [f"TORCH_CUDA_ARCH_LIST={major}.{minor}", "SMILE_KERNELS_FORCE_CUDA_BUILD=1"]


def on_cpu() -> Plan:
    """The rehearsal: every stage under Triton's interpreter, on shapes that take a second."""
    layer, small, other = "32x32", Setting(3, 4, 2, 1), Setting(3, 4, 2, 2)
    every = [check for check in selftest.checks("cpu") if check.backend == "triton" and not check.training]
    checks = {c.path: replace(c, shape=(5, 48, 32, 3, 4, 2, 1)) for c in every if c.dtype == torch.bfloat16}
    modes = (("graph", 3), ("eager", 3), ("training", 5))
    return Plan(
        device="cpu",
        checks=[*checks.values()],
        headline=[
            *(Row(layer, small, t, mode, "cpu") for mode, t in modes),
            Row(layer, small, 3, "kernels", "cpu", only=("chosen",)),
        ],
        settings=[Row(layer, other, 3, "graph", "cpu")],
        single=[Row(layer, small, 3, "graph", "cpu", only=("decode_one_launch fused",))],
        tests=["tests/ops/triton/test_kernels.py", "-k", "test_ties"],
        build=None,
        soak=Soak("cpu", 1.0, largest=6),
        workers=1,
        start_seconds=120.0,
        check_seconds=20.0,
        job_seconds=60.0,
        single_seconds=60.0,
    )


class Call:
    """One call of the script: its results so far, where they are written, and its stages."""

    def __init__(self, plan: Plan, seconds: float, out: Path, rehearsal: bool, work: Callable[[Any], Any]) -> None:
        self.plan, self.seconds, self.out, self.rehearsal = plan, seconds, out, rehearsal
        self.workers = [Worker(work, plan.start_seconds) for _ in range(plan.workers)]
        self.start = time.monotonic()
        self.folders = [out]
        self.builder: subprocess.Popen[bytes] | None = None
        self.failed: tuple[str, ...] = ()
        self.part: Record = {
            "machine": {"rehearsal": rehearsal},
            "limits": [],
            "checks": [],
            "tests": {"passed": 0, "skipped": 0, "failed": []},
            "stages": {},
            "records": [],
        }

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def ends(self, stage: str) -> float:
        """The end of a stage on the clock of `time.monotonic`."""
        return self.start + ENDS[stage] * self.seconds

    def write(self) -> None:
        for folder in self.folders:
            write_json(folder / "triton.json", self.part)

    def run(self) -> None:
        """Run every stage in order, also if earlier ones failed."""
        for name in ENDS:
            with self.stage(name):
                getattr(self, f"_{name}")()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the error of a stage, and continue with the next."""
        print(f"{self.spent:5.0f} s  {name}", flush=True)
        try:
            yield
            self.part["stages"].setdefault(name, "")
        except Exception as error:
            self.part["stages"][name] = f"raised {type(error).__name__}: {error}"[:500]
        try:
            self.write()
        except OSError as error:
            print(f"results are not written: {error}", flush=True)

    def jobs(self, stage: str, jobs: Sequence[Any], seconds: float, workers: int = 1) -> None:
        """Measure rows, skipping the paths that failed; jobs that did not end in time are counted."""
        done = 0

        def ended(job: Any, outcome: Outcome) -> None:
            nonlocal done
            done += 1
            keep = not getattr(job, "prepare", False)
            if outcome.failure is not None or keep:
                self.part["records"].append(outcome.result or _failed(job, outcome.failure))
                self.write()
            shown = outcome.failure or _shown(outcome.result)
            print(f"{self.spent:5.0f} s  {job.name}: {shown}"[:160], flush=True)

        jobs = [replace(job, skip=self.failed) if isinstance(job, Row | Soak) else job for job in jobs]
        run_all(self.workers[:workers], jobs, seconds=seconds, deadline=self.ends(stage), report=ended)
        if done < len(jobs):
            self.part["stages"][stage] = f"{len(jobs) - done} of {len(jobs)} rows did not end in time"

    def restart(self, first: int = 0) -> None:
        """End the processes from `first` on, which restart with their next job: this frees memory and drops caches."""
        for worker in self.workers[first:]:
            worker.close()

    def _machine(self) -> None:
        """The device and its limits; the CUDA library is built in parallel with the following stages."""
        if self.plan.build is not None:
            log = open(self.out / "build.log", "wb")  # noqa: SIM115  the builder holds it
            self.builder = subprocess.Popen(
                self.plan.build, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

        def ended(_: Any, outcome: Outcome) -> None:
            if outcome.failure is not None:
                raise RuntimeError(outcome.failure)
            self.part.update(outcome.result)
            print(f"{self.spent:5.0f} s  {self.part['machine']['device']}", flush=True)

        job = Machine(self.plan.device, self.rehearsal)
        limits = {"seconds": self.plan.job_seconds, "deadline": self.ends("machine")}
        run_all(self.workers[:1], [job], **limits, report=ended)
        if not self.rehearsal:
            self.folders.append(folder_of(self.part["machine"]["device"]))
            self.folders[-1].mkdir(parents=True, exist_ok=True)

    def _paths(self) -> None:
        """Compare every path, except for the single launch, with the reference, in many processes, which compile it."""
        self._verify("paths", [check for check in self.plan.checks if not check.waits], self.plan.check_seconds)

    def _verify(self, stage: str, checks: Sequence[selftest.Check], seconds: float) -> None:
        def ended(check: selftest.Check, outcome: Outcome) -> None:
            self.part["checks"].append(selftest.as_record(check, outcome))
            self.write()
            if outcome.failure is not None:
                print(f"{self.spent:5.0f} s  {check.name}: {outcome.failure}"[:160], flush=True)

        limits = {"seconds": seconds, "deadline": self.ends(stage)}
        found = selftest.verify(checks, self.workers, **limits, report=ended)
        if len(found) < len(checks):
            self.part["stages"][stage] = f"{len(checks) - len(found)} of {len(checks)} checks did not end in time"
        timed = [check for check in checks if check.backend == "triton" and check.dtype == torch.bfloat16]
        failed = {c.path for c in timed if not c.training and c.name in found and found[c.name].failure is not None}
        self.failed = (*self.failed, *sorted(failed))

    def _compile(self) -> None:
        """Compile the headline's kernels at their full sizes into Triton's cache, which all processes share."""
        rows = [replace(row, prepare=True) for row in self.plan.headline if row.mode != "eager"]
        self.jobs("compile", rows, float("inf"), self.plan.workers)
        self.restart(1)

    def _headline(self) -> None:
        self.jobs("headline", self.plan.headline, self.plan.job_seconds)

    def _tests(self) -> None:
        """The tests, without stopping at a failure, ended as a group at their time limit."""
        log = self.out / "tests.jsonl"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.pytest_log"]
        command += [f"--junitxml={self.out / 'tests.xml'}", *self.plan.tests]
        environment = {
            **os.environ,
            "BENCH_PYTEST_LOG": str(log),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            # pytest ends on an interrupt and writes its results; otherwise it is killed.
            for sent, until in ((signal.SIGINT, self.ends("tests") - 10), (signal.SIGKILL, self.ends("tests"))):
                try:
                    process.wait(max(0.1, until - time.monotonic()))
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, sent)
                    self.part["stages"]["tests"] = "the time limit was reached before the last test"
            _kill(process)
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
        lines = log.read_text().splitlines() if log.exists() else []
        outcomes = [json.loads(line) for line in lines]
        self.part["tests"] = {
            **{kind: sum(test["outcome"] == kind for test in outcomes) for kind in ("passed", "skipped")},
            "failed": [test for test in outcomes if test["outcome"] == "failed"],
        }
        if not outcomes:
            raise RuntimeError(f"no test ran: {' | '.join(said[-3:])}")

    def _cuda(self) -> None:
        """The CUDA library's kernels, once it is built."""
        if self.builder is None:
            self.part["stages"]["cuda"] = "the CUDA library is not built in a rehearsal"
            return
        try:
            status = self.builder.wait(max(0.1, self.ends("cuda") - 15 - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(self.builder)
            raise RuntimeError("the CUDA library was not built in time") from None
        if status != 0:
            raise RuntimeError(f"the CUDA library was not built, exit status {status}: see build.log")
        self.restart()  # earlier processes found no library
        known = {check.name for check in self.plan.checks}
        listed = self.workers[0](Listing(self.plan.device), self.plan.job_seconds)
        if listed.failure is not None:
            raise RuntimeError(listed.failure)
        new = [check for check in listed.result["checks"] if check.name not in known]
        self._verify("cuda", new, self.plan.job_seconds)
        rows = [row for row in self.plan.headline if row.mode in ("graph", "eager")]
        self.jobs("cuda", [replace(row, only=("smile:cuda",)) for row in rows], self.plan.job_seconds)

    def _settings(self) -> None:
        self.jobs("settings", self.plan.settings, self.plan.job_seconds)

    def _soak(self) -> None:
        left = max(1.0, self.ends("soak") - time.monotonic() - 10 * (self.plan.device == "cuda"))
        job = replace(self.plan.soak, seconds=min(self.plan.soak.seconds, left))
        self.jobs("soak", [job], job.seconds + self.plan.job_seconds)

    def _single(self) -> None:
        """The single launch, whose programs wait for one another: in a separate process, after everything else."""
        self.restart()
        self._verify("single", [check for check in self.plan.checks if check.waits], self.plan.single_seconds)
        if not any(check["failure"] for check in self.part["checks"] if check["linear"] == "decode_one_launch"):
            self.jobs("single", self.plan.single, self.plan.single_seconds)

    def close(self) -> None:
        self.restart()
        if self.builder is not None:
            _kill(self.builder)

    def conclude(self) -> None:
        """Print and write the text, last of all."""
        try:
            text = self.text()
            (self.out / "summary.txt").write_text(text + "\n")
        except Exception as error:  # the results are already written
            text = f"no summary: {type(error).__name__}: {error}; the results are in {self.out / 'triton.json'}"
        print(f"\n{text}"[:PRINTED_BYTES], flush=True)

    def text(self) -> str:
        """The final summary: failures, the headline, cases in which another path was faster, the aims."""
        failures = gpu_tables.failures(self.part)
        headline = gpu_tables.headline(self.part) or "Nothing was timed."
        aims = "\n".join(gpu_tables.aims(self.part))
        rehearsal = "A REHEARSAL ON A CPU: NOTHING HERE IS A MEASUREMENT\n" * self.rehearsal
        parts = [
            f"{rehearsal}{self.spent:.0f} s of {self.seconds:.0f}. {gpu_tables.summary(self.part)}",
            f"Failed:\n{_cut(failures, 2500)}",
            f"Time over F.linear (floor):\n{headline}",
            _cut(gpu_tables.faster_paths(self.part), 1500),
            _cut(aims, 2500),
        ]
        return "\n\n".join(part for part in parts if part)


def _failed(job: Any, failure: str | None) -> Record:
    """The record of a row without a result."""
    about = {"layer": job.layer, "setting": vars(job.setting), "tokens": job.tokens} if isinstance(job, Row) else {}
    return {"name": job.name, **about, "mode": getattr(job, "mode", job.name), "failure": failure}


def _shown(record: Record) -> str:
    """One line of a record's ratios to F.linear, the smallest first."""
    if "us" not in record:
        return ", ".join(f"{name}: {reason}" for name, reason in record.get("wrong", {}).items()) or "ok"
    ratios = sorted((ratio, name) for name, ratio in gpu_tables.over_linear(record).items())
    return ", ".join(f"{name} {ratio:.2f}" for ratio, name in ratios)


def _cut(text: str, most: int) -> str:
    """Whole lines of the text, about `most` characters."""
    lines: list[str] = []
    length = 0
    for i, line in enumerate(text.splitlines()):
        length += len(line) + 1
        if length > most:
            return "\n".join([*lines, f"... and {len(text.splitlines()) - i} lines more: see triton.json"])
        lines.append(line)
    return "\n".join(lines)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def sanitize() -> None:
    """Small cases of every path under compute-sanitizer, each tensor in a separate allocation; stops at a finding."""
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer: not found; it comes with the CUDA toolkit")
    chosen = "test_forward_by_every_path and bfloat16 or test_backward and tied"
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "pytest", "-x"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        subprocess.run(
            [*command, "-k", chosen, "tests/ops/triton/test_kernels.py"], cwd=ROOT, env=environment, check=True
        )


def main(arguments: Sequence[str] | None = None, work: Callable[[Any], Any] = perform_job) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="another folder for the results; created if missing")
    parser.add_argument("--seconds", type=float, default=530.0, help="of the whole call")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, under Triton's interpreter")
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args(arguments)
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse: runs under Triton's interpreter; expected TRITON_INTERPRET=1 in the environment")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; expected one, or --rehearse")
    if options.sanitize:
        sanitize()
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        call = Call(on_cpu() if options.rehearse else on_gpu(), options.seconds, out, options.rehearse, work)
        try:
            call.run()
        finally:
            call.close()
            call.conclude()


if __name__ == "__main__":
    main()
