"""Messages, metrics and a tracker of one's own: what they are given, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from oreal_megatron.config import ConfigError, EvaluationConfig, parse_config
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from oreal_megatron.evaluation import own_metrics
from oreal_megatron.extensions import check_functions
from oreal_megatron.metrics import Tracker
from oreal_megatron.types import Prompt, StepReport, Verdict
from tests.graded import graded

OWN = f"{__name__}."


def messages(*, question):
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": question.upper()}]


def no_messages(*, question):
    return question


def render(composed, function):
    prompt = parse_config(composed(f"prompt.function={OWN}{function}")).prompt
    return PromptRenderer(arithmetic_tokenizer(), prompt, vocab_size=105)


def test_messages_of_ones_own_are_rendered_by_the_template(composed):
    renderer = render(composed, "messages")
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nA+1<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.question_ids("a+1") == renderer.text_ids(text)
    assert renderer.between_turns([("tool", "6")]) == renderer.text_ids(
        "\n<|im_start|>tool\n6<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match=r"no_messages returned '1\+1' for the question '1\+1'; return a list"):
        render(composed, "no_messages").question_ids("1+1")


def test_fingerprint_changes_with_the_source_of_the_function(composed, tmp_path, monkeypatch):
    def fingerprint(text: str) -> str:
        (tmp_path / "parts_of_a_test.py").write_text(
            f"def messages(*, question):\n    return [{{'role': 'user', 'content': '{text}' + question}}]\n"
        )
        sys.modules.pop("parts_of_a_test", None)
        importlib.invalidate_caches()
        prompt = parse_config(composed("prompt.function=parts_of_a_test.messages")).prompt
        return PromptRenderer(arithmetic_tokenizer(), prompt, vocab_size=105).fingerprint

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert fingerprint("a ") != fingerprint("of another length ")
    monkeypatch.delitem(sys.modules, "parts_of_a_test")


def most(*, greedy, sampled):
    return max(len(group) for group in sampled) + 10 * len(greedy)


def text(*, greedy, sampled):
    return "much"


@pytest.mark.parametrize(
    ("name", "function", "problem"),
    [
        ("problems", "most", "evaluation.functions.problems = .*most: there is a metric of this name"),
        ("mine", "text", "evaluation.functions.mine = .*text returned a str; return a number"),
    ],
)
def test_metrics_of_ones_own(composed, single_process, name, function, problem):
    prompt = Prompt(id="a", question="q", gold_answer="1")
    one = graded(prompt, 0, Verdict.CORRECT)

    def metrics(name, function):
        config: EvaluationConfig = parse_config(composed(f"+evaluation.functions.{name}={OWN}{function}")).evaluation
        return own_metrics(config, [one], [[one, one]], known=["problems"], groups=single_process)

    assert metrics("mine", "most") == {"mine": 12.0}
    with pytest.raises(ValueError, match=problem):
        metrics(name, function)


def write(*, record, directory):
    with (directory / "mine.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def fails(*, record, directory):
    raise ConnectionError("the service does not answer")


@pytest.mark.parametrize("function", ["write", "fails"])
def test_tracker_of_ones_own_gets_every_record_and_ends_no_run(composed, tmp_path, caplog, function):
    overrides = ["tracking.console=quiet", "tracking.wandb=disabled", "tracking.tensorboard=false"]
    config = parse_config(composed(*overrides, f"tracking.function={OWN}{function}"))
    tracker = Tracker(config, tmp_path, is_main=True)
    tracker.start(0, is_evaluated=False)
    for number in range(2):
        tracker.step(StepReport(step=number, metrics={"loss/policy": 0.5}, seconds={"total": 1.0}))
    tracker.close()
    records = (tmp_path / "metrics.jsonl").read_text()
    assert records.count("\n") == 2
    if function == "write":
        mine = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
        assert mine == [json.loads(line) for line in records.splitlines()]
    else:
        assert caplog.text.count("fails raised ConnectionError: the service does not answer") == 2


def test_functions_that_do_not_exist_are_named_before_the_run(composed):
    overrides = ["prompt.function=no.where", "tracking.function=no.where", "+evaluation.functions.mine=no.where"]
    overrides.append("rollout.sampling.function=no.where")
    found = {violation.key for violation in check_functions(parse_config(composed(*overrides)))}
    assert found == {
        "prompt.function",
        "tracking.function",
        "evaluation.functions.mine",
        "rollout.sampling.function",
    }
    with pytest.raises(ConfigError):
        render(composed, "nothing")
