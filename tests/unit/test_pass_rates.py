"""Pass rates are estimated in batches that do not depend on the layout, so that a resume finds them in the journal."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from oreal_megatron.config import parse_config
from oreal_megatron.metrics import Tracker
from oreal_megatron.pass_rates import _with_pass_rates
from oreal_megatron.rollout.sampler import SampleResult
from oreal_megatron.types import Prompt, Verdict


@pytest.mark.parametrize("data_size", [1, 4, 64])
def test_batches_do_not_depend_on_the_number_of_replicas(composed, tmp_path, data_size):
    config = parse_config(
        composed(
            "data.pass_rate={samples: 4, max_prompts: null}", "rollout.batch_size=8", "tracking.console=quiet",
            "tracking.wandb=disabled",
        )
    )  # fmt: skip
    sampled = {}

    def sample(prompts, *, batch_name, **options):
        sampled[batch_name] = [prompt.id for prompt in prompts]
        return SampleResult(groups=[[answered] for _ in prompts], unfinished=[], metrics={})

    groups = SimpleNamespace(
        data_size=data_size, is_main=False, from_main=lambda value: value, together=contextlib.nullcontext
    )
    journal = SimpleNamespace(forget=lambda name: None)
    run = SimpleNamespace(
        config=config, groups=groups, directory=tmp_path, tracker=Tracker(config, tmp_path, is_main=True),
        sampler=SimpleNamespace(sample=sample, journal=journal, check_undecided=lambda *_: None),
    )  # fmt: skip
    answered = SimpleNamespace(verdict=Verdict.CORRECT, is_correct=True, rollout=SimpleNamespace(num_response_tokens=5))
    prompts = [Prompt(id=f"{i}", question=f"{i}+1", gold_answer="1") for i in range(70)]
    rated = _with_pass_rates(prompts, run)
    assert [(prompt.pass_rate, prompt.response_tokens) for prompt in rated] == [(1.0, 5.0)] * 70
    assert sampled == {
        f"pass_rates_{part:06d}": [f"{i}" for i in range(70)][32 * part : 32 * part + 32] for part in range(3)
    }
