"""Selection of prompts, and demonstrations from graded rollouts, by the commands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.cli.data import main
from oreal_megatron.data.curation import rejection_sampling
from oreal_megatron.data.curation.selection import even_shares
from oreal_megatron.files import json_line
from oreal_megatron.trajectories import to_records
from oreal_megatron.types import Prompt, Verdict
from tests.graded import graded
from tests.unit.data.curation.test_curation import report

TOPICS = ("Algebra", "Geometry", "Number Theory")
SIZES = {"Algebra": 40, "Geometry": 12, "Number Theory": 5}
CORRECT, INCORRECT, UNDECIDED = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """57 prompts of three topics, with pass rates 0, 1/8, ... 1 in turn and every tenth without one."""
    records = []
    for topic, size in SIZES.items():
        for i in range(size):
            record = {
                "question": f"{topic} {i}?",
                "gold_answer": "1",
                "topic": topic,
                "skills": [topic.lower(), f"{i % 3}"],
            }
            records.append(record | ({} if i % 10 == 9 else {"pass_rate": i % 9 / 8}))
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def selected(rated: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[dict[str, Any]], dict]:
    output = rated.with_name("selected.jsonl")
    found = report(capsys, "select", rated, "--output", output, *options)
    return lines(output), found


def test_band_and_condition_are_kept_with_every_key_in_order(rated, capsys):
    chosen, found = selected(rated, capsys, "--pass-rate", "0.25", "0.5", "--where", "topic == 'Algebra'")
    wanted = [r for r in lines(rated) if r["topic"] == "Algebra" and 0.25 <= r.get("pass_rate", -1) <= 0.5]
    assert chosen == wanted and len(wanted) == 12
    counts = found["counts"]
    assert counts["written"] == 12 and counts["left out, without a pass rate"] == 5
    assert sum(counts.values()) == 57
    assert found["tables"]["pass rate"]["0.2_to_0.4"] + found["tables"]["pass rate"]["0.4_to_0.6"] == 12
    chosen, _ = selected(rated, capsys, "--where", "contains(skills, 'geometry') && pass_rate > `0.5`")
    assert {r["topic"] for r in chosen} == {"Geometry"} and min(r["pass_rate"] for r in chosen) > 0.5


def test_a_sample_is_even_and_depends_on_the_seed_alone(rated, capsys):
    chosen, found = selected(rated, capsys, "--balance", "topic", "--limit", "30")
    assert Counter(r["topic"] for r in chosen) == {"Algebra": 13, "Geometry": 12, "Number Theory": 5}
    assert found["tables"]["topic"] == {"Algebra": 13, "Geometry": 12, "Number Theory": 5}
    assert found["counts"]["left out, beyond the limit"] == 27
    assert selected(rated, capsys, "--balance", "topic", "--limit", "30")[0] == chosen
    assert selected(rated, capsys, "--balance", "topic", "--limit", "30", "--seed", "1")[0] != chosen
    assert Counter(r["topic"] for r in selected(rated, capsys, "--balance", "topic")[0]) == dict.fromkeys(TOPICS, 5)
    chosen, _ = selected(rated, capsys, "--limit", "20")
    assert len(chosen) == 20 and [r for r in lines(rated) if r in chosen] == chosen


def test_even_shares_by_hand():
    assert even_shares({"a": 9, "b": 1, "c": 5}, 8) == {"a": 4, "b": 1, "c": 3}
    assert even_shares({"a": 2, "b": 2}, 3) == {"a": 2, "b": 1}
    assert even_shares({"a": 2, "b": 2}, 4) == {"a": 2, "b": 2}
    assert even_shares({}, 0) == {}


def test_a_selection_of_nothing_says_why(rated, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["select", str(rated), "--where", "topic == 'Logic'", "--output", str(rated.with_name("o.jsonl"))])
    assert ended.value.code == 1 and not rated.with_name("o.jsonl").exists()
    assert "none of 57 records meets the conditions: 57 left out by --where" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["select", str(rated), "--where", "topic ==", "--output", "o.jsonl"])
    assert ended.value.code == 2 and "'topic ==' is no JMESPath expression" in capsys.readouterr().err


A, B, C = (Prompt(id=f"p{i}", question=f"What is {i}+{i}?", gold_answer=f"{2 * i}") for i in range(3))
GROUPS = [
    [
        graded(A, 0, CORRECT, 9, text="long: \\boxed{0}", answer="0"),
        graded(A, 1, CORRECT, 5, text="short: \\boxed{0}", answer="0"),
        graded(A, 2, CORRECT, 6, text="Short: $\\boxed{0}$.", answer="0"),
        graded(A, 3, INCORRECT, 2, text="\\boxed{1}", answer="1"),
        graded(A, 4, UNDECIDED, 2, text="\\boxed{?}"),
    ],
    [graded(B, 0, CORRECT, 3, text="cut \\boxed{2}", answer="2", stopped=False), graded(B, 1, INCORRECT, text="x")],
    [
        graded(C, 0, CORRECT, 4, text="\\boxed{4}", answer="4"),
        graded(C, 1, CORRECT, 7, text="so \\boxed{4}", answer="4"),
    ],
]
SCORES = {"p0#0": 2.0, "p0#1": -1.0, "p2#1": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run with one step, whose evaluation is not read."""
    for name, groups in (("trajectories/step_000000.jsonl", GROUPS), ("evaluations/x_000000.jsonl", GROUPS[2:])):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(map(json_line, to_records(groups, scores=SCORES))))
    return tmp_path / "run"


def test_the_shortest_verified_responses_become_demonstrations_with_their_origin(run, tmp_path, capsys):
    output = tmp_path / "d.jsonl"
    found = report(capsys, "sft-from-rollouts", run, "--best", "2", "--output", output)
    assert found["counts"] == {
        "written": 4, "left out, INCORRECT": 2, "left out, UNDECIDED": 1, "left out, truncated": 1,
        "left out, equal to another response": 1, "left out, behind better ones": 0,
    }  # fmt: skip
    assert found["tables"]["problems"] == {"with a verified response": 2, "without": 1}
    written = lines(output)
    assert [(r["prompt_id"], r["sample_index"]) for r in written] == [("p0", 0), ("p0", 1), ("p2", 0), ("p2", 1)]
    wanted = {
        "verdict": "CORRECT", "verdict_by": "rules", "answer": "0", "gold_answer": "0", "num_tokens": 5,
        "from": f"{run}/trajectories/step_000000.jsonl:2",
    }  # fmt: skip
    assert {key: written[1][key] for key in wanted} == wanted
    assert [one["response"] for one in written][:2] == ["long: \\boxed{0}", "short: \\boxed{0}"]
    report(capsys, "sft-from-rollouts", run, "--output", output)
    assert [r["response"] for r in lines(output)] == ["short: \\boxed{0}", "\\boxed{4}"]


def test_the_reward_model_ranks_where_it_scored_and_messages_are_turns(run, tmp_path, capsys):
    output = tmp_path / "d.jsonl"
    found = report(capsys, "sft-from-rollouts", run, "--by", "reward_model", "--messages", "--output", output)
    assert found["counts"]["left out, without a score of the reward model"] == 2
    assert [(r["reward_model_logit"], r["messages"]) for r in lines(output)] == [
        (2.0, [{"role": "user", "content": A.question}, {"role": "assistant", "content": "long: \\boxed{0}"}]),
        (0.5, [{"role": "user", "content": C.question}, {"role": "assistant", "content": "so \\boxed{4}"}]),
    ]


def test_responses_in_a_journal_are_read_without_the_line_of_a_killed_process(tmp_path, capsys):
    journal = tmp_path / "rates" / "journal" / "pass_rates_0_000000.replica_0.jsonl"
    journal.parent.mkdir(parents=True)
    unit = json_line({"unit": "u", "rollouts": [one.to_json() for group in GROUPS for one in group]})
    journal.write_bytes(unit + unit[:50])
    output = tmp_path / "d.jsonl"
    found = report(capsys, "sft-from-rollouts", tmp_path / "rates", "--output", output)
    assert found["counts"]["written"] == 2 == len(lines(output))
    for path, message in ((tmp_path, "there are no graded rollouts"), (output, "d.jsonl:1: not a graded rollout")):
        with pytest.raises(SystemExit) as ended:
            main(["sft-from-rollouts", str(path), "--output", str(tmp_path / "o.jsonl")])
        assert ended.value.code == 1 and message in capsys.readouterr().err


def test_lines_that_are_appended_while_demonstrations_are_chosen_change_none(run, tmp_path, monkeypatch, capsys):
    """A journal may be that of a live evaluation."""
    first, second = (run / "trajectories" / f"step_00000{step}.jsonl" for step in range(2))
    every = first.read_bytes().splitlines(keepends=True)
    wrong = [line for line in every if json.loads(line)["grade"]["verdict"] == "INCORRECT"]
    second.write_bytes(b"".join(every))
    first.write_bytes(wrong[0])
    report(capsys, "sft-from-rollouts", run, "--best", "2", "--output", tmp_path / "before.jsonl")
    chosen = rejection_sampling._chosen

    def then_appended(*arguments):
        places = chosen(*arguments)
        with first.open("ab") as file:
            file.write(wrong[0])
        return places

    monkeypatch.setattr(rejection_sampling, "_chosen", then_appended)
    report(capsys, "sft-from-rollouts", run, "--best", "2", "--output", tmp_path / "d.jsonl")
    assert lines(tmp_path / "d.jsonl") == lines(tmp_path / "before.jsonl") != []


def test_a_rollout_without_a_key_that_is_read_is_refused(run, tmp_path, capsys):
    journal = run / "trajectories" / "step_000000.jsonl"
    record = json.loads(journal.read_text().splitlines()[0])
    del record["finish_reason"]
    journal.write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit):
        main(["sft-from-rollouts", str(run), "--output", str(tmp_path / "d.jsonl")])
    assert "step_000000.jsonl:1: not a graded rollout: KeyError('finish_reason')" in capsys.readouterr().err
