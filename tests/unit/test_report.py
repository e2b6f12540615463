"""The report of made-up runs: numbers that are missing, an evaluation alone, and what a reader needs to know."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from oreal_megatron import __version__
from oreal_megatron.report import _drawn_panels, write_report

STEP = {"reward/pass_rate": 0.5, "loss/reward_model": None, "data/groups": 8.0, "data/kept_groups": 0.0}


@pytest.fixture
def report(composed, tmp_path):
    def write(num_steps: int, scores: dict[int, float | None]) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(composed(f"run.num_steps={num_steps}")))
        steps = [
            {"kind": "step", "step": i, "skipped": None, "metrics": STEP, "seconds": {"total": 1.0}, "peak_gib": {}}
            for i in range(num_steps)
        ]
        evaluations = [
            {"kind": "evaluation", "step": i, "metrics": {"b/problems": 30.0, "b/greedy_pass@1": s}, "seconds": 1.0}
            for i, s in scores.items()
        ]
        lines = "".join(json.dumps(record) + "\n" for record in evaluations + steps)
        (tmp_path / "metrics.jsonl").write_text(lines)
        return write_report(tmp_path).read_text()

    return write


def words(html: str) -> str:
    return " ".join(re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_evaluation_alone_has_one_number_and_its_n(report):
    html = report(0, {0: 0.3})
    assert "30.0% greedy pass@1 on b (30 problems), the initial policy, before any step" in words(html)
    assert "before and after" not in html and "&rarr;" not in html and "<h2>Training" not in html


def test_report_has_percent_date_versions_and_a_viewport(report):
    html = report(2, {0: 0.3, 2: 0.4})
    text = words(html)
    assert "30.0% &rarr; 40.0% greedy pass@1 on b (30 problems), before and after 2 steps; best 40.0% after 2" in text
    assert re.search(
        rf"written \d{{4}}-\d\d-\d\d \d\d:\d\d UTC by oreal_megatron {__version__} \(Python .*torch ", text
    )
    assert "b/greedy_pass@1 30.0% 40.0%" in text and "2 of 2 steps" in text
    assert '<meta name="viewport" content="width=device-width' in html
    # A panel of its own for each metric that has values, beside the evaluation's, so that a phone shows one a row.
    assert html.count("<svg") == 4


def test_scores_that_no_response_decides_are_dashes(report):
    text = words(report(1, {0: None, 1: None}))
    assert "- &rarr; - greedy pass@1 on b" in text and "nan" not in text and "None" not in text


def test_responses_of_a_prompt_are_side_by_side_from_where_they_part(report, tmp_path):
    def record(verdict, ids, weights, prompt="p"):
        return {
            "prompt": {"id": prompt, "question": f"1 < {prompt}?", "gold_answer": "2"}, "grade": {"verdict": verdict},
            "advantage": 1.0 if verdict == "CORRECT" else -1.0, "response_ids": ids, "token_weights": weights,
            "token_scores": [0.5] * len(ids), "token_texts": [f"<{id}>" for id in ids],
        }  # fmt: skip

    (tmp_path / "trajectories").mkdir()
    records = [
        record("INCORRECT", [9], [0.5], prompt="alone"),
        record("CORRECT", [1, 2, *range(100, 800)], [0.0, 0.0, 3.0, *[0.25] * 699]),
        record("INCORRECT", [1, 2, 7], [0.0, 0.0, 0.75]),
    ]
    (tmp_path / "trajectories" / "step_000001.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    html = report(2, {0: 0.3, 2: 0.4})
    text = words(html)
    assert "Token weights of step 1" in html and html.index("1 &lt; p?") < html.index("1 &lt; alone?")
    both = "CORRECT , advantage +1.00 &lt;1&gt; &lt;2&gt; &#x2503; &lt;100&gt;"
    assert both in text and "&lt;699&gt; [100 tokens] INCORRECT , advantage -1.00 &lt;1&gt; &lt;2&gt; &#x2503;" in text
    assert 'title="3.000" style="background: rgba(46, 160, 67, 0.850)"' in html
    assert html.count("Confidence after each token") == 2


def test_prompts_drawn_by_band_and_source_have_a_panel_each_without_empty_bands():
    drawn = {"data/drawn_pass_rate_0": 0.25, "data/drawn_pass_rate_0.2_to_0.4": 0.75, "data/drawn_pass_rate_1": 0.0}
    steps = [{"metrics": STEP}, {"metrics": {**STEP, **drawn, "data/drawn_from_math": 1.0}}]
    bands = [("0", "data/drawn_pass_rate_0"), ("0.2 to 0.4", "data/drawn_pass_rate_0.2_to_0.4")]
    assert _drawn_panels(steps) == [
        ("Prompts by pass rate", "%", 100, bands),
        ("Prompts by source", "%", 100, [("math", "data/drawn_from_math")]),
    ]
    assert _drawn_panels(steps[:1]) == []
