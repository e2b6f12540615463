"""Results of an evaluation: JSON, page and tables; and the comparison of two evaluations, by hand."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from oreal_megatron.evaluation_report import (
    benchmark_results,
    comparison,
    differing_settings,
    print_comparison,
    print_results,
    read_results,
    response_records,
    write_responses,
    write_results,
)
from oreal_megatron.intervals import interval_of_mean
from oreal_megatron.scores import problem_scores
from oreal_megatron.trajectories import read_groups
from oreal_megatron.types import Benchmark, Prompt, Verdict
from tests.graded import graded

C, W, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED
HOSTILE = "</script><script>document.title = 'changed'</script><b>bold</b> {{ 7 * 7 }} \u2028"
SETTINGS = {
    "model": "models/<b>m</b>", "weights": "0" * 16, "seed": 0, "dtype": "float32", "backend": "embedded",
    "sampling": {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 24},
}  # fmt: skip


def results_of(verdicts, samples=(), *, names=None, gold="1"):
    """Results of a benchmark. verdicts: of greedy responses. samples: verdicts of each problem's samples."""
    names = names or [f"p{i}" for i in range(len(verdicts))]
    prompts = [Prompt(id=id, question=f"What is {id}?", gold_answer=gold) for id in names]
    greedy = [graded(p, 0, v, 4 + i, answer="a") for i, (p, v) in enumerate(zip(prompts, verdicts, strict=True))]
    groups = [[graded(p, i, v, text=HOSTILE) for i, v in enumerate(g)] for p, g in zip(prompts, samples, strict=False)]
    scores = problem_scores(greedy, groups, lambda pairs: [a == b for a, b in pairs], ks=[2])
    benchmark = Benchmark(name="b", prompts=tuple(prompts), samples=len(groups[0]) if groups else 0)
    return benchmark_results(benchmark, greedy, groups, scores), greedy, groups


def printed(show, *arguments) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, *arguments)
    return console.export_text()


def test_results_have_scores_intervals_and_lengths(tmp_path):
    results, greedy, groups = results_of([C, W, C], [[C, W], [W, W], [C, C]])
    assert results["metrics"]["greedy_pass@1"] == 2 / 3 and results["metrics"]["avg@2"] == 0.5
    assert results["intervals"]["greedy_pass@1"] == interval_of_mean([1.0, 0.0, 1.0])
    assert results["tokens"] == {"mean": 39 / 9, "median": 4, "longest": 6}
    assert [problem["scores"]["avg@2"] for problem in results["problems"]] == [0.5, 0.0, 1.0]
    written = write_results(tmp_path, SETTINGS, {"b": results}, response_records("b", greedy, groups))
    assert read_results(tmp_path) == read_results(tmp_path / "evaluation.json") == json.loads(json.dumps(written))
    write_responses(tmp_path, "b", greedy, groups)
    assert [[one.verdict for one in group] for group in read_groups(tmp_path / "responses" / "b.sampled.jsonl")] == [
        [C, W], [W, W], [C, C],
    ]  # fmt: skip
    shown = printed(print_results, written)
    assert re.search(r"b +│ +3 │ greedy_pass@1 │ 66.7% │ 20.8% to 93.9%", shown)
    assert re.search(r"b +│ +9 │ +0.0% │ +0.0% │ +66.7% │ +4 │ +4 │ +6", shown)


def test_the_page_has_every_response_as_text(tmp_path):
    results, greedy, groups = results_of([C, U], [[C, W], [W, W]])
    write_results(tmp_path, SETTINGS, {"b": results}, response_records("b", greedy, groups))
    page = (tmp_path / "evaluation.html").read_text()
    data = re.search(r'<script id="records" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    records = json.loads(data)
    assert [(record["problem"], record["kind"], record["verdict"]) for record in records] == [
        ("p0", "greedy", "CORRECT"), ("p0", "sample 0", "CORRECT"), ("p0", "sample 1", "INCORRECT"),
        ("p1", "greedy", "UNDECIDED"), ("p1", "sample 0", "INCORRECT"), ("p1", "sample 1", "INCORRECT"),
    ]  # fmt: skip
    assert records[1]["text"] == HOSTILE
    # No response and no name is read as HTML, and nothing is fetched.
    assert page.count("<script") == 2 and "<b>bold" not in page and "<b>m</b>" not in page
    assert "innerHTML" not in page and not re.search(r"https?://|src=|<link", page)


def test_a_comparison_pairs_problems_and_names_those_that_flipped():
    first, _, _ = results_of([C, C, W, W, W], [[C, W]] * 5)
    second, _, _ = results_of([C, W, C, C, W], [[C, C]] * 4 + [[C, W]])
    compared = comparison({"benchmarks": {"b": first, "only": first}}, {"benchmarks": {"b": second}})
    assert list(compared) == ["b"]
    one = compared["b"]
    assert one["problems"] == 5 and one["left_out"] == 0
    assert [problem["id"] for problem in one["gained"]] == ["p2", "p3"]
    assert [problem["id"] for problem in one["lost"]] == ["p1"]
    assert one["sign_test"] == 1.0  # two against one
    assert one["scores"]["greedy_pass@1"]["difference"] == pytest.approx(0.2)
    average = one["scores"]["avg@2"]
    assert (average["first"], average["second"]) == (0.5, 0.9)
    low, high = average["interval"]
    assert 0 < low < average["difference"] < high <= 0.5
    shown = printed(print_comparison, compared)
    assert "b: greedy gained 2 and lost 1 of 5 problems (sign test: p = 1)" in shown
    assert "+ p3  gold 1  What is p3?" in shown and "- p1  gold 1  What is p1?" in shown


def test_problems_of_one_evaluation_alone_are_left_out_and_counted():
    first, _, _ = results_of([C, W], names=["a", "b"])
    second, _, _ = results_of([C, W, W], names=["b", "c", "d"])
    one = comparison({"benchmarks": {"b": first}}, {"benchmarks": {"b": second}})["b"]
    assert one["problems"] == 1 and one["left_out"] == 3 and [problem["id"] for problem in one["gained"]] == ["b"]
    assert one["scores"]["greedy_pass@1"] == {"first": 0.0, "second": 1.0, "difference": 1.0, "interval": None}
    assert "3 problems are in one evaluation only" in printed(print_comparison, {"b": one})


def test_what_cannot_be_compared_says_why(tmp_path):
    first, _, _ = results_of([C])
    other, _, _ = results_of([C], gold="2")
    with pytest.raises(ValueError, match="no benchmark in common: b in the first, c in the second"):
        comparison({"benchmarks": {"b": first}}, {"benchmarks": {"c": first}})
    with pytest.raises(ValueError, match="b: problem p0 has another question or gold answer"):
        comparison({"benchmarks": {"b": first}}, {"benchmarks": {"b": other}})
    with pytest.raises(ValueError, match="b: no problem in common"):
        comparison({"benchmarks": {"b": first}}, {"benchmarks": {"b": results_of([C], names=["x"])[0]}})
    with pytest.raises(ValueError, match="there is no such file"):
        read_results(tmp_path)
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(ValueError, match="not the results of oreal-eval"):
        read_results(tmp_path)


def test_settings_in_which_two_evaluations_differ_are_named():
    judged = SETTINGS | {"verifier": {"judge": {"mode": "undecided"}}, "model": "another"}
    (found,) = differing_settings(SETTINGS | {"verifier": {"judge": {"mode": "off"}}}, judged)
    assert found.startswith("verifier: {'judge': {'mode': 'off'}} in the first")
