"""A loop of several turns in whole runs on two processes, of which one runs the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import invoke

pytestmark = pytest.mark.end_to_end


def by_loop(name: str) -> str:
    return f"rollout.generation={{function: {__name__}.{name}}}"


async def two_turns(*, conversation, question, **_):
    await conversation.generate(8)
    conversation.append_message("tool", question[-4:])
    await conversation.generate()


def responses(directory: Path) -> dict[str, tuple[list[int], list[list[int]]]]:
    lines = (directory / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    return {r["id"]: (r["response_ids"], r["inserted_spans"]) for r in map(json.loads, lines)}


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_layouts_write_the_same_responses(warm, layout):
    options = (
        "run.num_steps=1",
        "evaluation=none",
        "objective=grpo",
        "objective.actor_freeze_steps=0",
        "rollout.batch_size=8",
        by_loop("two_turns"),
    )
    one, two = warm("one"), warm("two")
    assert invoke(*options, f"run.dir={one}").returncode == 0
    outcome = invoke(*options, layout, f"run.dir={two}", num_processes=2)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert responses(one) == responses(two) and len(responses(one)) == 32
    metrics = [json.loads((each / "metrics.jsonl").read_text().splitlines()[0])["metrics"] for each in (one, two)]
    assert metrics[1]["loss/kl"] == pytest.approx(metrics[0]["loss/kl"], abs=1e-6)
    assert metrics[1]["policy/grad_norm"] == pytest.approx(metrics[0]["policy/grad_norm"], rel=1e-3, abs=1e-6)
    assert max(each["policy/rollout_logprob_difference"] for each in metrics) < 1e-4
    assert metrics[0]["rollout/inserted_tokens"] > 10
