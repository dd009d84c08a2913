"""A plugin of pytest that writes the outcome of each test at once: pytest -p gpu_parts.pytest_lines."""

from __future__ import annotations

import json
import os
from typing import Any

LINES = "FASTPPO_TEST_RESULTS"  # names the file, in the environment


class Writer:
    def __init__(self, path: str):
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        record = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            record["error"] = str(getattr(report.longrepr, "reprcrash", report.longrepr))[:500]
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")


def pytest_configure(config: Any) -> None:
    path = os.environ.get(LINES)
    if path and not hasattr(config, "workerinput"):  # with pytest-xdist the workers' reports come to the one in front
        config.pluginmanager.register(Writer(path))
