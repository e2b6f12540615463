"""A real SGLang server: what it generates, with which weights, and what happens when it is killed, frozen or stale."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from oreal_megatron.config import SamplingConfig
from oreal_megatron.records import FinishReason
from oreal_megatron.rollout.engine import GenerationRequest
from tests.servers.conftest import STOP, open_servers

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=24)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=200)
PROMPTS = ((5, 6, 8, 9), (100, 101, 102), (17,), tuple(range(20, 60)))

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]


def requests_of(prompts, max_new_tokens=24):
    return [GenerationRequest(prompt_ids=ids, seed=i, max_new_tokens=max_new_tokens) for i, ids in enumerate(prompts)]


def assert_as_transformers(completions, directory):
    """Greedy tokens are transformers' on the weights in `directory`, log-probabilities within 1e-5."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = list(completion.token_ids)
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert ids == logprobs.argmax(-1).tolist()
        expected = logprobs.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
        assert completion.finish_reason is (FinishReason.STOP if ids[-1] == STOP else FinishReason.LENGTH)
        assert STOP not in ids[:-1] and (ids[-1] == STOP or len(ids) == 24)


def perturb(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_greedy_tokens_are_those_of_the_published_weights(servers, tiny_qwen):
    before = servers.engine.generate(requests_of(PROMPTS), GREEDY)
    assert_as_transformers(before, tiny_qwen)
    pid = servers.fleet.members[0].process.pid
    torch.manual_seed(1)
    perturb(servers.policy)
    servers.engine.publish(1)
    after = servers.engine.generate(requests_of(PROMPTS), GREEDY)
    assert servers.fleet.members[0].process.pid == pid  # the same server took them
    assert {c.weight_version for c in before} == {0} and {c.weight_version for c in after} == {1}
    assert [c.token_ids for c in before] != [c.token_ids for c in after]
    # The directory that was published is the policy: an independent reader of it agrees with the server.
    assert_as_transformers(after, servers.directory / "weights" / "version_000001")
