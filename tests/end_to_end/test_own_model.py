"""Runs of a Hugging Face model whose vocabulary, positions or numbers do not fit the run."""

from __future__ import annotations

import json
from datetime import date

import pytest
import torch
import yaml

from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from tests.tiny import TINY, command_line
from tests.tiny_models import LOGPROB_ROUNDING, save_tiny

pytestmark = pytest.mark.end_to_end

NOT_OF_OWN_MODELS = ("sft.", "model.geometry.", "objective.actor_freeze_steps=", "evaluation.every=")
OWN_MODEL = (
    *(override for override in TINY if not override.startswith(NOT_OF_OWN_MODELS)),
    "model=huggingface", "model.tokenizer=arithmetic", "model.max_sequence_length=128", "sft=none", "evaluation=none",
    "run.num_steps=1", "run.mode=rollout", "data.prompts_per_step=2", "rollout.sampling.top_p=1.0",
)  # fmt: skip
TOKENS = 105  # of the arithmetic tokenizer; the last one, \boxed{, is in no prompt


def own_run(model, directory, *overrides):
    """`oreal-train` on a model directory: one step of rollouts, without training."""
    return command_line(*OWN_MODEL, f"model.path={model}", f"run.dir={directory}", *overrides)


@pytest.mark.parametrize("rows", [TOKENS - 1, TOKENS + 15])
def test_a_vocabulary_that_is_not_the_tokenizers_keeps_transformers_logprobs(tmp_path, rows):
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "model", "qwen2", tied=True, vocabulary=rows)
    outcome = own_run(model, tmp_path / "run")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    lines = (tmp_path / "run" / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        prompt, response = record["prompt_ids"], record["response_ids"]
        assert max(response) < rows
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(record["logprobs"]), expected, atol=LOGPROB_ROUNDING, rtol=0)
    assert len(lines) == 8
    assert ("token ids beyond the 104 rows" in outcome.stdout) == (rows < TOKENS)


def test_a_prompt_or_stop_token_without_a_row_is_refused_with_its_id(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen2", tied=True, vocabulary=TOKENS - 2)
    refused = own_run(model, tmp_path / "run")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "'Compute ' with id 103, and the model's embedding has 103 rows: set model.tokenizer" in refused.stderr


def test_what_does_not_fit_the_run_is_refused_before_any_work(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen2", tied=True, max_position_embeddings=128)
    long = own_run(model, tmp_path / "long", "model.max_sequence_length=129")
    assert "model.max_sequence_length = 129" in long.stderr and "is for 128 positions" in long.stderr
    exam = tmp_path / "exam.jsonl"
    records = [{"id": str(n), "question": "1+" * n + "1", "gold_answer": str(n + 1)} for n in (1, 40)]
    exam.write_text("".join(json.dumps(record) + "\n" for record in records))
    overlong = own_run(
        model, tmp_path / "overlong", f"+evaluation.benchmarks={{exam: {{path: {exam}, samples: 0, limit: null}}}}"
    )
    assert "evaluation.benchmarks.exam: 1 of 2 prompts are longer than prompt.max_prompt_tokens = 64" in overlong.stderr
    for refused in (long, overlong):
        assert refused.returncode == 1 and "Traceback" not in refused.stderr


def test_a_run_goes_on_with_the_day_on_which_it_began(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen2", tied=True, vocabulary=TOKENS)
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    dated = f"model.tokenizer={tmp_path}/tokenizer"
    first = own_run(model, tmp_path / "run", dated)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("config.yaml", "journal/config.yaml"):  # as if the run had begun on an earlier day
        path = tmp_path / "run" / name
        saved = yaml.safe_load(path.read_text())
        assert abs((date.fromisoformat(saved["prompt"]["date"]) - date.today()).days) <= 1
        saved["prompt"]["date"] = "2020-02-01"
        path.write_text(yaml.safe_dump(saved))
    later = own_run(model, tmp_path / "run", dated, "run.num_steps=2")
    assert later.returncode == 0, later.stdout + later.stderr
    lines = (tmp_path / "run/trajectories/step_000001.jsonl").read_text().splitlines()
    shown = {tokenizer.decode(json.loads(line)["prompt_ids"])[:11] for line in lines}
    assert shown == {"01 Feb 2020"}
