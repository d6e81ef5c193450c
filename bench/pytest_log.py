"""A pytest plugin that writes each test's outcome as it ends, for a run that may be killed: -p bench.pytest_log.

The file is named by the environment variable BENCH_PYTEST_LOG; one JSON object a line.
"""

import json
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # only the first of pytest-xdist's processes writes
        config.pluginmanager.register(_Log(os.environ["BENCH_PYTEST_LOG"]))


class _Log:
    def __init__(self, file: str) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = "" if report.outcome == "passed" else str(report.longrepr).strip().splitlines()[-1][:500]
            with open(self.file, "a") as log:
                log.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "message": message}) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            message = str(report.longrepr).strip().splitlines()[-1][:500]
            with open(self.file, "a") as log:
                log.write(json.dumps({"test": report.nodeid, "outcome": "failed", "message": message}) + "\n")
