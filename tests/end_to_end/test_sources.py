"""A run of OREAL on several weighted sources with a curriculum: what its metrics say of the prompts that it drew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oreal_megatron.data.difficulty import BANDS
from tests.tiny import invoke, metrics_of

pytestmark = pytest.mark.end_to_end

NUM_STEPS, PROMPTS = 9, 8


def write_sums(path: Path, first: int, number: int) -> None:
    """Writes sums whose pass rate is said to be 0.3."""
    pairs = [(first + i // 9, 1 + i % 9) for i in range(number)]
    records = [{"question": f"Compute {a}+{b}.", "gold_answer": str(a + b), "pass_rate": 0.3} for a, b in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_drawn_shares_are_the_weights_while_pass_rates_change(tmp_path):
    write_sums(tmp_path / "easy.jsonl", 1, 16)
    write_sums(tmp_path / "hard.jsonl", 5, 24)
    sources = f"{{easy: {{path: {tmp_path}/easy.jsonl, weight: 3}}, hard: {{path: {tmp_path}/hard.jsonl, weight: 1}}}}"
    run = invoke(
        f"data.train={sources}", f"data.prompts_per_step={PROMPTS}", f"run.num_steps={NUM_STEPS}", "evaluation=none",
        "data.curriculum={rollout_weight: 0.5}", f"run.dir={tmp_path}/run", "run.checkpoint_every=4",
        "data.difficulty_balance=[{low: 0.0, high: 0.35, repeat: 2}, {low: 0.35, high: 1.0, repeat: 1}]",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    steps = [record["metrics"] for record in metrics_of(tmp_path / "run") if record["kind"] == "step"]
    assert len(steps) == NUM_STEPS
    drawn = {name: sum(step.get(f"data/drawn_from_{name}", 0.0) for step in steps) for name in ("easy", "hard")}
    assert drawn["easy"] + drawn["hard"] == pytest.approx(NUM_STEPS)
    # A prompt that is put off to the next step is counted there.
    assert abs(drawn["easy"] - 0.75 * NUM_STEPS) * PROMPTS <= 2
    # In the first step, every prompt has the pass rate of its file; later ones have those of the run's responses.
    bands = [{band: step[f"data/drawn_pass_rate_{band}"] for band in BANDS} for step in steps]
    assert bands[0]["0.2_to_0.4"] == 1.0
    assert sum(step["0.2_to_0.4"] for step in bands) < NUM_STEPS - 1
    assert all(sum(step.values()) == pytest.approx(1.0) for step in bands)
