"""Shared by all tests; this folder is on the import path, so tests may import the modules in it.

Models here are so small that threads only get in each other's way, so each process gets one, those that tests start
included.
"""

import os
import random

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
# Chooses the points at which the tests of faults strike: the same for all workers, another in every session.
os.environ.setdefault("FAULT_SEED", str(random.SystemRandom().randrange(10**6)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what tests have recorded as a `fact`, from whichever process."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, fact in report.user_properties:
                    if name == "fact":
                        terminalreporter.write_line(str(fact))
