"""Checks, duplicates and contamination of prompt files, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oreal_megatron.cli.data import main
from oreal_megatron.data.curation.text import tokens
from oreal_megatron.data.golds import EMPTY, PHRASE, SOLUTION, check_golds, gold_fault
from oreal_megatron.data.prompts import read_prompts
from oreal_megatron.types import Prompt

REPEATED, CONFLICTING = "question of an earlier line", "question of an earlier line with another gold answer"
UNREADABLE = "gold answer that the verifier cannot read"
SOUND = "without a fault of its own"


def write(path: Path, *pairs: tuple[str, str | None]) -> Path:
    lines = [json.dumps({"question": question, "gold_answer": gold}) for question, gold in pairs]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def report(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> dict:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == status, err
    return json.loads(out)


def questions(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


GSM8K_SOLUTION = "In April she sold 48 clips.\nIn May she sold 48/2 = <<48/2=24>>24 clips.\nThat is 72 in all.\n#### 72"


@pytest.mark.parametrize(
    ("gold", "fault"),
    [
        ("", EMPTY),
        ("  ", EMPTY),
        ("4", None),
        ("#### 4", None),
        ("The answer is 4.", None),
        ("Therefore, the final answer is 4.", None),
        ("\\boxed{4}", None),
        ("$\\boxed{\\frac{1}{2}}$", None),
        ("x=2 \\text{ or } x=3", None),
        ("\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}", None),
        ("\\text{There are none}", None),
        (GSM8K_SOLUTION, SOLUTION),
        (GSM8K_SOLUTION.split("\n####")[0], SOLUTION),
        ("We add. $\\boxed{4}$", SOLUTION),
        ("The function is increasing on the whole interval", PHRASE),
    ],
)
def test_gold_fault(gold, fault):
    assert gold_fault(gold) == fault


def test_check_counts_every_fault_and_writes_the_other_lines(tmp_path, capsys):
    path = write(
        tmp_path / "p.jsonl",
        ("What is 2+2?", "4"),
        ("What is 2 + 2 ?", "4"),
        ("What is $2+2$?", "5"),
        ("What is $2+2$?", "\\frac{8}{2}"),
        ("a", None),
        ("b", "The function is increasing on the whole interval"),
        ("c", GSM8K_SOLUTION),
        ("d", "\\frac{1}{"),
        ("", "1"),
        ("e", "\\frac{1}{2}"),
    )
    found = report(capsys, "check", path, status=1)
    assert found["counts"] == {
        SOUND: 5,
        REPEATED: 2,
        CONFLICTING: 1,
        EMPTY: 1,
        PHRASE: 1,
        SOLUTION: 1,
        UNREADABLE: 1,
        "empty question": 1,
    }
    assert {example["where"]: example["kind"] for example in found["examples"]}[f"{path}:8"] == UNREADABLE
    report(capsys, "check", path, "--output", tmp_path / "sound.jsonl")
    assert questions(tmp_path / "sound.jsonl") == [
        "What is 2+2?",
        "What is 2 + 2 ?",
        "What is $2+2$?",
        "What is $2+2$?",
        "e",
    ]


def test_check_of_a_sound_file_ends_well(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", ("What is 2+2?", "4"), ("What is 2+3?", "5"))
    assert report(capsys, "check", path)["counts"] == {SOUND: 2}


def test_check_counts_prompts_that_are_too_long_in_the_chat_template(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", ("1+1", "2"), ("1" * 100, "2"))
    found = report(capsys, "check", path, "prompt.max_prompt_tokens=60", status=1)
    assert found["counts"] == {SOUND: 1, "prompt longer than prompt.max_prompt_tokens": 1}
    assert found["examples"][0]["where"] == f"{path}:2"


def test_check_names_the_tokenizer_that_is_missing(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", ("1+1", "2"))
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path), "experiment=own_model"])
    assert ended.value.code == 1 and "model.tokenizer" in capsys.readouterr().err


def test_file_with_each_question_a_hundred_times_is_warned_of_and_deduplicated(tmp_path, capsys, caplog):
    pairs = [(f"Find the sum of the first {n} primes.", str(n)) for n in range(3, 8)]
    path = write(tmp_path / "p.jsonl", *(pairs * 100))
    read_prompts(path)
    assert "500 lines have 5 different questions" in caplog.text and "oreal-data dedupe" in caplog.text
    assert report(capsys, "check", path)["counts"] == {SOUND: 500, REPEATED: 495}
    found = report(capsys, "dedupe", path, "--output", tmp_path / "u.jsonl")
    assert found["counts"] == {"written": 5, "equal question": 495}
    assert questions(tmp_path / "u.jsonl") == [question for question, _ in pairs]


NEAR = (
    "A train leaves the station at 9 am and travels north at 60 miles per hour for 3 hours. How far does it go?",
    "A train leaves a station at 9 am and travels north at 60 miles per hour for 3 hours. How far does it go?",
)


def test_dedupe_finds_near_duplicates_and_keeps_problems_with_other_numbers(tmp_path, capsys):
    other = NEAR[1].replace("60", "70")
    path = write(tmp_path / "p.jsonl", (NEAR[0], "180"), (NEAR[1], "180"), (other, "210"))
    found = report(capsys, "dedupe", path, "--output", tmp_path / "u.jsonl")
    assert found["counts"] == {"written": 2, "near duplicate": 1}
    assert questions(tmp_path / "u.jsonl") == [NEAR[0], other]
    assert report(capsys, "dedupe", path, "--threshold", 1, "--output", tmp_path / "u.jsonl")["counts"] == {
        "written": 3
    }


def test_dedupe_keeps_problems_of_a_template(tmp_path, capsys):
    pairs = [
        ("Given that $f(x) = x^k$ where $k > 0,$ what is the range of $f(x)$ on the interval from 1 on?", "1"),
        ("Given that $f(x) = x^k$ where $k < 0,$ what is the range of $f(x)$ on the interval from 1 on?", "1"),
        ("Determine the number of ways to arrange the letters of the word MADAM on one line.", "30"),
        ("Determine the number of ways to arrange the letters of the word RADII on one line.", "60"),
    ]
    path = write(tmp_path / "p.jsonl", *pairs)
    assert report(capsys, "dedupe", path, "--output", tmp_path / "u.jsonl")["counts"] == {"written": 4}


def test_dedupe_leaves_out_questions_with_gold_answers_of_other_values(tmp_path, capsys):
    path = write(
        tmp_path / "p.jsonl",
        ("What is half of 1?", "1/2"),
        ("What is half of 1?", "\\frac{1}{2}"),
        ("How many are 2 and 2?", "4"),
        ("How many are 2 and 2?", "The answer is 4."),
        ("Which number is it?", "7"),
        ("Which number is it?", "8"),
    )
    found = report(capsys, "dedupe", path, "--output", tmp_path / "u.jsonl")
    assert found["counts"] == {"written": 2, "equal question": 2, "question with several gold answers": 2}
    assert questions(tmp_path / "u.jsonl") == ["What is half of 1?", "How many are 2 and 2?"]


BENCHMARK = "The equations $x^{3}+A x+10=0$ and $x^{3}+B x^{2}+50=0$ have two roots in common. Compute their product."
PLANTED = "Two equations, $x^3 + Ax + 10 = 0$ and $x^3 + Bx^2 + 50 = 0,$ have two roots in common.  Find their product."


def test_decontaminate_finds_a_reworded_benchmark_problem(tmp_path, capsys):
    other_numbers = PLANTED.replace("50", "70")
    path = write(tmp_path / "p.jsonl", ("What is 2+2?", "4"), (PLANTED, "5"), (other_numbers, "6"))
    benchmark = write(tmp_path / "b.jsonl", ("How old is Ann?", "4"), (BENCHMARK, "5\\sqrt[3]{4}"))
    arguments = ("decontaminate", path, "--benchmark", benchmark, "--output", tmp_path / "c.jsonl")
    found = report(capsys, *arguments, "--matches", tmp_path / "m.jsonl")
    assert found["counts"] == {"written": 2, "overlaps with a benchmark": 1}
    assert questions(tmp_path / "c.jsonl") == ["What is 2+2?", other_numbers]
    [match] = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert (match["line"], match["benchmark_line"]) == (f"{path}:2", f"{benchmark}:2")
    assert match["question"] == PLANTED and match["benchmark_question"] == BENCHMARK and 0.5 < match["overlap"] < 1


def test_decontaminate_finds_a_benchmark_problem_that_is_shorter_than_an_n_gram(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", ("Compute 9!", "362880"), ("Compute 8!", "40320"))
    benchmark = write(tmp_path / "b.jsonl", ("Compute $9!$.", "362880"))
    report(capsys, "decontaminate", path, "--benchmark", benchmark, "--output", tmp_path / "c.jsonl")
    assert questions(tmp_path / "c.jsonl") == ["Compute 8!"]


def test_tokens_leave_out_layout_and_keep_what_changes_a_problem():
    assert tokens("Find $\\left( x, \\dfrac{1}{2} \\right)\\,.$") == tokens("find (x, \\frac12)")
    assert tokens("2-3") != tokens("2+3") and tokens("x_1") != tokens("x_2") and tokens("9!") != tokens("9")
    assert tokens("求解方程") == ["求", "解", "方", "程"]


def prompts(*golds: str) -> list[Prompt]:
    return [Prompt(id=str(index), question="q", gold_answer=gold) for index, gold in enumerate(golds)]


def test_run_refuses_whole_solutions_with_the_commands_that_help():
    with pytest.raises(ValueError) as caught:
        check_golds(prompts("4", GSM8K_SOLUTION), "data.train = g.jsonl", phrases_are_judged=True)
    message = str(caught.value)
    assert message.startswith("data.train = g.jsonl: 1 of 2 prompts have a whole solution as gold answer (first: 1, ")
    assert "oreal-data import g.jsonl" in message and "--final-answer" in message
    assert "oreal-data check g.jsonl" in message


def test_run_refuses_phrases_unless_a_judge_compares_them_or_they_are_few(caplog):
    phrase = "The function is increasing on the whole interval"
    with pytest.raises(ValueError, match="1 of 2 prompts have a phrase as gold answer"):
        check_golds(prompts("4", phrase), "data.train = g.jsonl", phrases_are_judged=False)
    check_golds(prompts("4", phrase), "data.train = g.jsonl", phrases_are_judged=True)
    assert not caplog.text
    check_golds(prompts(*["4"] * 19, phrase), "data.train = g.jsonl", phrases_are_judged=False)
    assert "1 of 20 prompts have a phrase as gold answer" in caplog.text
