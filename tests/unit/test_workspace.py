"""The directory and the training prompts that a run takes."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
import yaml

from oreal_megatron import workspace
from oreal_megatron.checkpoint.manifest import write_manifest
from oreal_megatron.config import ConfigError, parse_config, settings_of
from oreal_megatron.data.arithmetic import generate_arithmetic
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.prompts import warn_of_benchmarks
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from oreal_megatron.types import Benchmark, Prompt
from oreal_megatron.workspace import _train_prompts, claim_directory, with_day


@pytest.mark.parametrize("left", ["config.yaml", "journal/config.yaml", "checkpoints/step_000002/manifest.json"])
def test_each_record_of_the_configuration_refuses_another_run(composed, tmp_path, single_process, left):
    config, other = parse_config(composed()), parse_config(composed("objective.beta=0.5", "run.num_steps=7"))
    claim_directory(tmp_path, config, single_process)
    checkpoint = tmp_path / "checkpoints/step_000002"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {}, made_from=settings_of(config))
    for name in {"config.yaml", "journal/config.yaml", "checkpoints/step_000002/manifest.json"} - {left}:
        (tmp_path / name).unlink()
    place = tmp_path / left if left.endswith("yaml") else checkpoint
    with pytest.raises(ConfigError, match=f"objective.beta = 0.5: {place} was made with") as refused:
        claim_directory(tmp_path, other, single_process)
    assert len(refused.value.violations) == 1
    claim_directory(tmp_path, config, single_process)
    assert (tmp_path / "config.yaml").is_file()


def test_run_keeps_the_day_on_which_it_began(composed, tmp_path, single_process, monkeypatch):
    def on(day: str, *overrides: str):
        class Clock(datetime):
            @classmethod
            def now(cls):
                return cls.fromisoformat(f"{day}T23:59:59")

        monkeypatch.setattr(workspace, "datetime", Clock)
        found = with_day(tmp_path, parse_config(composed(*overrides)), single_process)
        claim_directory(tmp_path, found, single_process)
        return found.prompt.date

    assert on("2026-11-29") == "2026-11-29"
    assert on("2026-11-30") == "2026-11-30", "nothing depends on the day yet"
    (tmp_path / "checkpoints/initial").mkdir(parents=True)
    assert on("2026-12-01") == on("2026-12-02", "run.num_steps=7") == "2026-11-30"
    with pytest.raises(ConfigError, match=r"prompt\.date = '2026-12-02': .* was made with '2026-11-30'"):
        on("2026-12-02", "prompt.date=2026-12-02")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del saved["prompt"]["date"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    (tmp_path / "journal/config.yaml").unlink()
    assert on("2026-12-03") is None, "a run of version 0.1.0"
    with pytest.raises(ConfigError, match=r"prompt\.date = 'yesterday': It is no day\. Set it to one"):
        parse_config(composed("prompt.date=yesterday"))


def test_renamed_gsm8k_with_whole_solutions_is_refused_with_the_command_that_takes_the_answers(composed, tmp_path):
    path = tmp_path / "train.jsonl"
    solution = "In April she sold 48 clips.\nIn May she sold <<48/2=24>>24 clips, 72 in all.\n#### 72"
    path.write_text(json.dumps({"question": "How many?", "gold_answer": solution}) + "\n")
    config = parse_config(composed(f"data.train={path}"))
    tokenizer = arithmetic_tokenizer()
    renderer = PromptRenderer(tokenizer, config.prompt, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="1 of 1 prompts have a whole solution") as refused:
        _train_prompts(config, renderer, None)
    assert f"oreal-data import {path}" in str(refused.value)
    path.write_text(json.dumps({"question": "How many?", "gold_answer": "72"}) + "\n")
    assert [prompt.gold_answer for prompt in _train_prompts(config, renderer, None)] == ["72"]


def test_problems_of_a_benchmark_that_are_trained_on_are_counted(composed, caplog):
    def of(*questions: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(id=f"p{i}", question=question, gold_answer="1") for i, question in enumerate(questions))

    trained = of("What is $x$?", "How many are left, then?", "What is z?")
    warn_of_benchmarks(trained, [Benchmark(name="other", prompts=of("What is w?"), samples=0)])
    assert not caplog.messages
    warn_of_benchmarks(
        trained, [Benchmark(name="test", prompts=of("A?", "how many are left then", "what is x"), samples=0)]
    )
    (message,) = caplog.messages
    assert "evaluation.benchmarks.test: 2 of 3 problems are trained on too (first: p1, as p1)" in message
    generated = generate_arithmetic(parse_config(composed()).data.arithmetic, 0)
    warn_of_benchmarks(generated.train, [Benchmark(name="heldout", prompts=tuple(generated.heldout), samples=0)])
    assert len(caplog.messages) == 1


def test_several_sources_have_names_and_each_is_checked(composed, tmp_path, caplog):
    for name in "ab":
        lines = [json.dumps({"question": f"{name} {i}?", "gold_answer": f"{i}", "id": i}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, '{"question": "c?", "gold_answer": "1"}']))
    sources = f"data.train={{a: {{path: {tmp_path}/a.jsonl, weight: 3}}, b: {{path: {tmp_path}/b.jsonl, weight: 1}}}}"
    config = parse_config(composed(sources))
    tokenizer = arithmetic_tokenizer()
    renderer = PromptRenderer(tokenizer, config.prompt, vocab_size=len(tokenizer))
    found = _train_prompts(config, renderer, None)
    assert [(one.id, one.source) for one in found[:3]] == [("a/0", "a"), ("a/1", "a"), ("a/2", "a")]
    assert len({one.id for one in found}) == 8 and config.data.source_weights == {"a": 3.0, "b": 1.0}
    assert "1 questions are in several sources (first: a/a-000004 and b/b-000004)" in caplog.text
    paths = parse_config(composed(f"data.train={{a: {tmp_path}/a.jsonl, b: {tmp_path}/b.jsonl}}")).data
    assert paths.train_paths == config.data.train_paths and paths.source_weights is None
    (tmp_path / "b.jsonl").write_text('{"question": "c?", "gold_answer": "2 and 3 #### 3"}')
    with pytest.raises(ValueError, match=r"data\.train\.b\.path = .*b\.jsonl: 1 of 1 prompts have a whole solution"):
        _train_prompts(config, renderer, None)
