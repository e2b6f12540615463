"""Scripts answer --help before they do anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHELL = [path for pattern in ("*.sh", "*.sbatch", "*/*.sh") for path in sorted((ROOT / "slurm").glob(pattern))]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


def help_of(command: list, directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, timeout=300, cwd=directory, env=environment
    )
    assert outcome.returncode == 0 and not list(directory.iterdir()), outcome.stderr
    return outcome.stdout


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_script_shows_its_comment(script, tmp_path):
    shown = help_of(["bash", script], tmp_path)
    assert shown.split("\n")[0] == script.read_text().split("\n")[1].removeprefix("# ")
    assert "#SBATCH" not in shown and "set -" not in shown


@pytest.mark.end_to_end
@pytest.mark.parametrize("script", TOOLS, ids=lambda path: path.name)
def test_tool_shows_its_usage(script, tmp_path):
    assert help_of([sys.executable, script], tmp_path).startswith("usage:")


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_shows_its_usage(script, tmp_path):
    assert help_of([sys.executable, "-m", f"benchmarks.{script.stem}"], tmp_path).startswith("usage:")
