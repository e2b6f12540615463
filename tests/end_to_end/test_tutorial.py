"""The commands of docs/tutorial.md, taken from the page: whole (slow), and with short trainings and few responses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.end_to_end

REDUCED = {
    "sft.epochs=2 ": "sft.epochs=null sft.steps=120 ",
    "sft.epochs=3 ": "sft.epochs=null sft.steps=3 ",
    "--samples 4": "--samples 2 --limit 20",
    "--output rated.jsonl": "--output rated.jsonl --samples 2",
    "run.num_steps=50": "run.num_steps=2",
    "data.prompts_per_step=48": "data.prompts_per_step=8",
    "evaluation.every=25 run.checkpoint_every=25": "evaluation.every=2 run.checkpoint_every=2",
}


def run_page(page: Path, directory: Path, *, timeout: float) -> str:
    command = [sys.executable, ROOT / "tools/run_page.py", page, directory]
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def score(directory: Path) -> float:
    results = json.loads((directory / "evaluation.json").read_text())
    return results["benchmarks"]["test"]["metrics"]["greedy_pass@1"]


def check_data(directory: Path, said: str, text: str) -> None:
    """Every step of the data finds what was planted, and says what the page shows."""
    raw, imported, sound, unique, train = (
        num_lines(directory / name)
        for name in ("raw/train.jsonl", "imported.jsonl", "sound.jsonl", "unique.jsonl", "train.jsonl")
    )
    assert raw - imported == 6 and imported - sound == 10 and sound - unique == 151 and unique - train >= 25
    shown = re.findall(r"^```text\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(shown) >= 8
    missing = [line for block in shown[:4] for line in block.splitlines() if line not in said and line != "..."]
    assert not missing
    assert num_lines(directory / "demonstrations.jsonl") > 0 and 8 <= num_lines(directory / "middle.jsonl") < train


def test_reduced_tutorial_runs(tmp_path):
    text = (ROOT / "docs/tutorial.md").read_text()
    for whole, short in REDUCED.items():
        assert whole in text
        text = text.replace(whole, short)
    page = tmp_path / "tutorial.md"
    page.write_text(text)
    said = run_page(page, tmp_path / "run", timeout=500)
    check_data(tmp_path / "run", said, text)
    assert "greedy gained" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_tutorial_raises_the_scores_step_by_step(tmp_path):
    page = ROOT / "docs/tutorial.md"
    said = run_page(page, tmp_path / "run", timeout=3500)
    check_data(tmp_path / "run", said, page.read_text())
    base, sft, oreal = (score(tmp_path / "run/evaluations" / name) for name in ("base", "sft", "oreal"))
    assert base + 0.05 < sft < oreal - 0.05 and oreal > base + 0.2


def test_page_stops_at_the_first_command_that_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n\n```bash\necho begun\nfalse\n```\n\n```text\nbegun\n```\n\n```bash\necho not reached\n```\n"
    )
    command = [sys.executable, ROOT / "tools/run_page.py", page, tmp_path / "run"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stdout == "begun\n"
