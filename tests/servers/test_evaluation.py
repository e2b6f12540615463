"""`oreal-eval` with a launched server: the greedy responses of the embedded engine."""

from __future__ import annotations

import json

import pytest

from tests.servers.conftest import require_sglang
from tests.tiny import FORKS, command_in_fork

pytestmark = [pytest.mark.slow, pytest.mark.servers]

LENGTHS = ("prompt=chat", "model.max_sequence_length=128", "prompt.max_prompt_tokens=64", "run.threads=1",
           "rollout.sampling.max_new_tokens=24")  # fmt: skip


def test_a_server_has_the_greedy_responses_of_the_embedded_engine(finished, tmp_path):
    require_sglang()
    problems = tmp_path / "sums.jsonl"
    sums = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    problems.write_text("".join(f'{{"question": "Compute {a}+{b}.", "gold_answer": "{a + b}"}}\n' for a, b in sums))
    policy = str(finished / "huggingface" / "best" / "policy")
    texts = {}
    for rollout in ("embedded", "sglang_cpu"):
        log = str(tmp_path / f"{rollout}.log")
        arguments = (policy, "--benchmark", f"sums={problems}", *LENGTHS, f"rollout={rollout}",
                     f"run.dir={tmp_path / rollout}")  # fmt: skip
        process = FORKS.Process(target=command_in_fork, args=(arguments, log, log, "eval"))
        process.start()
        process.join(500)
        assert process.exitcode == 0, (tmp_path / f"{rollout}.log").read_text()
        lines = (tmp_path / rollout / "responses" / "sums.greedy.jsonl").read_text().splitlines()
        texts[rollout] = [json.loads(line)["text"] for line in lines]
    assert len(texts["embedded"]) == len(sums) and texts["embedded"] == texts["sglang_cpu"]
