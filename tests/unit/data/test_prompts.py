"""Prompt files, difficulty balance, the prompt stream and the generated problems."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from oreal_megatron.config import ArithmeticConfig, BalanceBin
from oreal_megatron.data.arithmetic import generate_arithmetic, worked_solution
from oreal_megatron.data.prompts import balanced, read_demonstrations, read_estimated, read_prompts, write_estimated
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.types import Prompt

RELEASED = [
    BalanceBin(low=0.0, high=0.2, repeat=6),
    BalanceBin(low=0.2, high=0.6, repeat=4),
    BalanceBin(low=0.6, high=0.8, repeat=2),
]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"p{i}", question=f"q{i}", gold_answer=str(i)) for i in range(count)]


def test_estimated_prompts_round_trip_for_their_source_alone(tmp_path):
    source = [Prompt(id="a", question="1+1?", gold_answer="2"), Prompt(id="b", question="1+2?", gold_answer="3")]
    wanted = [replace(source[0], pass_rate=0.25)]
    path = tmp_path / "p.jsonl"
    write_estimated(path, wanted, source=source)
    assert read_estimated(path, source=source) == wanted
    assert read_prompts(path) == wanted  # a prompt file like any other
    for other in (source[:1], source[::-1], [source[0], replace(source[1], gold_answer="4")]):
        with pytest.raises(ValueError, match=r"p\.jsonl:1: was estimated from other data"):
            read_estimated(path, source=other)


def test_published_files_need_no_id_and_no_pass_rate(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text(
        '{"question": "q", "gold_answer": 7, "source": "elsewhere"}\n\n{"question": "r", "gold_answer": "x"}\n'
    )
    assert [(p.id, p.gold_answer, p.pass_rate) for p in read_prompts(path)] == [
        ("math-000001", "7", None),
        ("math-000003", "x", None),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "p.jsonl:2: not JSON"),
        ("[1]", "p.jsonl:2: a JSON object is expected, not list"),
        ('{"question": "q"}', "p.jsonl:2: `gold_answer` is missing. Keys of the line: question. Name its keys"),
        ('{"question": "q", "gold_answer": ["1"]}', "p.jsonl:2: `gold_answer` is ['1'], a text is expected"),
        ('{"question": "", "gold_answer": "1"}', "p.jsonl:2: `question` is ''"),
        ('{"question": "q", "gold_answer": "1", "pass_rate": 1.5}', "p.jsonl:2: pass_rate is 1.5"),
        ('{"question": "q", "gold_answer": "1", "id": "p-000001"}', "p.jsonl:2: id 'p-000001' occurs twice"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "q", "gold_answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("read", [read_prompts, read_demonstrations])
def test_an_empty_or_missing_file_is_an_error(tmp_path, read):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: no (prompts|demonstrations) in it"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"none.jsonl: (cannot be read|neither a file nor a directory)"):
        read(tmp_path / "none.jsonl")


def test_difficulty_balance_repeats_as_released():
    rates = {"a": 0.0, "b": 0.2, "c": 0.59, "d": 0.6, "e": 0.8, "f": None}
    given = [Prompt(id=id, question=id, gold_answer="1", pass_rate=rate) for id, rate in rates.items()]
    assert Counter(p.id for p in balanced(given, RELEASED)) == {"a": 6, "b": 4, "c": 4, "d": 2}
    assert balanced(given, []) == given


def test_the_stream_sees_every_prompt_once_an_epoch():
    stream = PromptStream(prompts(10), prompts_per_step=5, seed=0)
    first, second = stream.draw() + stream.draw(), stream.draw() + stream.draw()
    assert sorted(p.id for p in first) == sorted(p.id for p in second) == sorted(p.id for p in prompts(10))
    assert [p.id for p in first] != [p.id for p in second]


def test_step_has_no_prompt_twice_and_loses_no_repetition():
    stream = PromptStream([p for p in prompts(6) for _ in range(4)], prompts_per_step=5, seed=1)
    drawn = [[p.id for p in stream.draw()] for _ in range(24)]
    assert all(len(set(step)) == 5 for step in drawn)
    counts = Counter(id for step in drawn for id in step)
    assert max(counts.values()) - min(counts.values()) <= 5  # 120 draws are five epochs of 24


def test_the_stream_resumes_to_the_exact_prompt():
    repeated = [p for p in prompts(7) for _ in range(3)]
    stream = PromptStream(repeated, prompts_per_step=4, seed=3)
    for _ in range(9):
        stream.draw()
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(repeated, prompts_per_step=4, seed=3)
    resumed.load_state_dict(state)
    assert [resumed.draw() for _ in range(20)] == [stream.draw() for _ in range(20)]


def test_too_few_prompts_and_foreign_states_are_errors():
    with pytest.raises(ValueError, match="only 3 different prompts"):
        PromptStream(prompts(3) * 4, prompts_per_step=4, seed=0)
    state = PromptStream(prompts(8), prompts_per_step=4, seed=0).state_dict()
    with pytest.raises(ValueError, match="of other data \\(8 prompts"):
        PromptStream(prompts(9), prompts_per_step=4, seed=0).load_state_dict(state)


def arithmetic(**changes) -> ArithmeticConfig:
    base = {
        "num_train": 50,
        "num_heldout": 40,
        "num_demonstrations": 60,
        "direct_shares": (1.0, 0.0),
        "wrong_order_share": 0.0,
        "min_terms": 2,
        "max_terms": 4,
        "max_operand": 20,
        "max_factor": 9,
        "operators": ("+", "-", "*"),
    }
    return ArithmeticConfig(**(base | changes))


def test_generated_sets_share_no_problem_and_golds_are_right():
    data = generate_arithmetic(arithmetic(), seed=0)
    train = {p.question for p in data.train}
    heldout = {p.question for p in data.heldout}
    shown = {d.question for d in data.demonstrations}
    assert (len(train), len(heldout), len(shown)) == (50, 40, 60)
    assert not train & heldout and not heldout & shown and not train & shown
    for prompt in (*data.train, *data.heldout):
        expression = prompt.question.removeprefix("Compute ").removesuffix(".")
        assert int(prompt.gold_answer) == eval(expression)
    for line in (line for d in data.demonstrations for line in d.response.split("\n")[:-1]):
        left, right = line.split("=")
        assert eval(left) == int(right)
    # From all without working at two terms to none at four.
    for demonstration in data.demonstrations:
        num_operators = len(re.findall(r"(?<=\d)[-+*]", demonstration.question))
        if num_operators != 2:
            assert demonstration.response.startswith("\\boxed{") == (num_operators == 1)


def test_worked_solution_keeps_precedence_and_order():
    assert worked_solution("8-3*2*2+1").split("\n") == ["3*2=6", "6*2=12", "8-12=-4", "-4+1=-3", "\\boxed{-3}"]


def test_wrong_order_is_shown_in_demonstrations_alone_and_at_its_share():
    """Lines with a choice are those whose leftmost operation is not the next product."""
    assert worked_solution("8-3*2", lambda: True).split("\n") == ["8-3=5", "5*2=10", "\\boxed{10}"]
    changes = {"direct_shares": (0.0, 0.0), "num_demonstrations": 600, "wrong_order_share": 0.4, "min_terms": 3}
    data, right = (generate_arithmetic(arithmetic(**(changes | more)), 0) for more in ({}, {"wrong_order_share": 0.0}))
    assert data.train == right.train and data.heldout == right.heldout
    chosen = []
    for wrong, demonstration in zip(data.demonstrations, right.demonstrations, strict=True):
        if re.match(r"Compute \d+[-+].*\*", demonstration.question):
            chosen.append(wrong.response.split("\n")[0] != demonstration.response.split("\n")[0])
    assert len(chosen) > 100 and abs(sum(chosen) / len(chosen) - 0.4) < 0.1


def test_generation_depends_on_the_seed_and_says_when_it_runs_dry():
    assert generate_arithmetic(arithmetic(), 0) == generate_arithmetic(arithmetic(), 0)
    assert generate_arithmetic(arithmetic(), 0) != generate_arithmetic(arithmetic(), 1)
    with pytest.raises(ValueError, match=r"data.arithmetic: found \d+ distinct problems where 150 are needed"):
        generate_arithmetic(arithmetic(max_operand=2, max_factor=2, max_terms=2), 0)


def test_a_balance_that_steps_cannot_keep_is_said_and_does_not_pile_up(caplog):
    hard, easy = prompts(80)[:40], prompts(80)[40:]
    stream = PromptStream(hard * 6 + easy * 2, prompts_per_step=64, seed=0)
    assert "with 6 of the 320 entries should be in a step of 64 prompts 1.2 times" in caplog.text
    assert "at most 53" in caplog.text
    drawn = Counter(prompt.id for _ in range(90) for prompt in stream.draw())
    assert min(drawn[prompt.id] for prompt in hard) >= 85, "hard prompts are in nearly every step"
    assert len(stream.state_dict()["put_off"]) <= 320
    caplog.clear()
    stream = PromptStream(hard * 6 + easy * 2, prompts_per_step=53, seed=0)
    assert not caplog.text
    drawn = Counter(prompt.id for _ in range(600) for prompt in stream.draw())
    ratio = sum(drawn[prompt.id] for prompt in hard) / sum(drawn[prompt.id] for prompt in easy)
    assert ratio == pytest.approx(3.0, rel=0.02)
