"""Supervised fine-tuning as a run of its own: kills change nothing, and what it leaves is a model to go on with."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.config import ArithmeticConfig
from oreal_megatron.data.arithmetic import generate_arithmetic
from oreal_megatron.planner.step_time import read_measured
from tests.run_processes import RunProcess, content_of
from tests.tiny import invoke, metrics_of

pytestmark = pytest.mark.end_to_end

SFT = (
    "run.mode=sft", "run.num_steps=0", "sft.steps=null", "sft.batch_size=8", "run.checkpoint_every=5",
    "run.keep_checkpoints=100", "evaluation.every=20", "parallel.micro_batch_tokens=200",
)  # fmt: skip
NUM_STEPS = 49


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, ...]:
    """Options that name two sources, one of several turns, and held-out records."""
    directory = tmp_path_factory.mktemp("records")
    config = ArithmeticConfig(
        num_train=8, num_heldout=8, num_demonstrations=360, direct_shares=(0.0, 0.0), wrong_order_share=0.0,
        min_terms=2, max_terms=3, max_operand=9, max_factor=3, operators=("+",),
    )  # fmt: skip
    shown = generate_arithmetic(config, 0).demonstrations
    turns = [[{"role": "user", "content": d.question}, {"role": "assistant", "content": d.response}] for d in shown]
    written = {
        "single": [{"question": d.question, "response": d.response} for d in shown[:120]],
        "double": [{"messages": first + second} for first, second in zip(turns[120:220], turns[220:320], strict=True)],
        "heldout": [{"messages": messages} for messages in turns[320:]],
    }
    for name, records in written.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    single, double = f"{{path: {directory}/single.jsonl, weight: 1.5}}", f"{{path: {directory}/double.jsonl}}"
    return (
        f"sft.sources={{single: {single}, double: {double}}}",
        f"sft.heldout={{path: {directory}/heldout.jsonl}}",
        "sft.epochs=1.4",  # of 1.5 x 120 + 100 conversations
    )


def metrics(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    records = metrics_of(directory)
    for record in records:
        record["metrics"].pop("sft/tokens_per_second", None)
    return records


def test_kills_at_random_instants_change_nothing(sources, single_process, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = RunProcess(whole, *SFT, *sources)
    assert uninterrupted.wait() == 0, uninterrupted.said()
    rng = random.Random(0)
    num_kills = 0
    for _ in range(2):
        process = RunProcess(killed, *SFT, *sources)
        seen = len(list(killed.glob("checkpoints/step_*")))
        alive = process.wait_until(lambda seen=seen: len(list(killed.glob("checkpoints/step_*"))) > seen)
        time.sleep(rng.uniform(0, 0.1))
        if not alive or process.is_over:
            break
        process.kill(with_children=rng.random() < 0.5)
        num_kills += 1
    last = RunProcess(killed, *SFT, *sources)
    assert last.wait() == 0, last.said()
    assert num_kills == 2
    assert metrics(killed) == metrics(whole)
    name = f"checkpoints/step_{NUM_STEPS:06d}"
    mine, expected = content_of(killed / name), content_of(whole / name)
    assert any("exp_avg_sq.policy." in key for key in expected) and not any("reward_model" in key for key in expected)
    assert mine.keys() == expected.keys()
    assert [key for key in expected if mine[key] != expected[key]] == []
    records = metrics(whole)
    losses = [r["metrics"]["loss/nll"] for r in records if r["kind"] == "step"]
    heldout = [r["metrics"]["sft/heldout_loss"] for r in records if r["kind"] == "evaluation"]
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0] - 0.5 and heldout[-1] < heldout[0] - 0.5
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 20, 40, NUM_STEPS]
    first = records[1]["metrics"]
    assert 0.8 < read_measured(whole).mean_response_tokens / (first["sft/tokens"] / first["sft/conversations"]) < 1.25
    # What is left: an export with the tokenizer, and a page.
    assert (whole / "huggingface/best/policy/model.safetensors").is_file()
    page = (whole / "report.html").read_text()
    for words in ("supervised fine-tuning", "Loss of fine-tuning", "Loss of held-out records", "Learning rate"):
        assert words in page
    # The same command with another length goes on.
    longer = invoke(*SFT, *sources, "sft.epochs=null", f"sft.steps={NUM_STEPS + 2}", f"run.dir={whole}")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert f"step {NUM_STEPS + 1}  loss" in longer.stdout and f"step {NUM_STEPS - 1}  loss" not in longer.stdout
    assert "sft.optimizer: the decay of the learning rate has 51 updates now and had 49" in longer.stdout


def test_fault_of_the_records_leaves_the_directory_free_for_the_remedy(tmp_path):
    records = tmp_path / "records.jsonl"
    good, long = {"prompt": "1+1?", "response": "2"}, {"prompt": "1+2?", "response": "3" * 200}
    directory = tmp_path / "run"
    command = (*SFT, "sft.steps=1", f"sft.demonstrations={records}", "evaluation=none", f"run.dir={directory}")
    for broken, message in ({"prompt": "1+2?"}, "`response` is missing"), (long, "sft.overlong=drop to leave them out"):
        records.write_text("".join(json.dumps(record) + "\n" for record in (good, broken)))
        refused = invoke(*command)
        assert refused.returncode == 1 and message in refused.stderr + refused.stdout
        assert not list(directory.glob("checkpoints/*"))
    # The remedies change the records, a setting and a key of the model.
    mended = invoke(*command, "sft.overlong=drop", "model.max_sequence_length=160")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "1 of 2 conversations" in mended.stdout + mended.stderr
    assert (directory / "checkpoints/step_000001").is_dir()
