"""Top-p sampling by inversion, against probabilities worked out by hand."""

from __future__ import annotations

import pytest
import torch

from oreal_megatron.config import SamplingConfig
from oreal_megatron.rollout.embedded import sample
from oreal_megatron.rollout.sample_call import SampleCall
from oreal_megatron.types import GenerationRequest, Prompt

# Most likely first: tokens 2, 0, 3, 1. The whole distribution is inverted in the order of the tokens.
PROBABILITIES = torch.tensor([0.3, 0.05, 0.5, 0.15])


def draw(uniforms, **sampling) -> tuple[list[int], list[float]]:
    logits = PROBABILITIES.log().expand(len(uniforms), 4)
    config = SamplingConfig(**({"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1} | sampling))
    tokens, logprobs = sample(logits, torch.tensor(uniforms), config)
    return tokens.tolist(), logprobs.exp().tolist()


def test_the_cumulative_distribution_is_inverted():
    tokens, probabilities = draw([0.0, 0.29, 0.31, 0.34, 0.36, 0.84, 0.86, 0.9999999])
    assert tokens == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probabilities == pytest.approx([0.3, 0.3, 0.05, 0.05, 0.5, 0.5, 0.15, 0.15])


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    # 0.5 + 0.3 reach 0.8: tokens 2 and 0, drawn as 5 to 3; the log-probabilities stay those before top-p.
    tokens, probabilities = draw([0.0, 0.62, 0.63, 0.9999999], top_p=0.8)
    assert tokens == [2, 2, 0, 0]
    assert probabilities == pytest.approx([0.5, 0.5, 0.3, 0.3])


def test_a_tiny_top_p_is_greedy():
    assert draw([0.0, 0.99], top_p=1e-6)[0] == [2, 2]


def test_temperature_scales_the_logits():
    squared = PROBABILITIES.square() / PROBABILITIES.square().sum()
    tokens, probabilities = draw([0.5], temperature=0.5)
    assert tokens == [2] and probabilities == pytest.approx([squared[2].item()])
    assert draw([0.9], temperature=0.0) == ([2], pytest.approx([0.5]))


def test_frequencies_follow_the_nucleus():
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0)).tolist()
    counts = torch.bincount(torch.tensor(draw(uniforms, top_p=0.9)[0]), minlength=4) / len(uniforms)
    torch.testing.assert_close(counts, torch.tensor([0.3, 0.0, 0.5, 0.15]) / 0.95, atol=0.01, rtol=0)


@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_a_large_vocabulary_samples_the_nucleus_of_a_full_sort(spread):
    """A flat distribution takes the way round the selection, a peaked one goes through it."""
    logits = torch.randn(32, 5000, generator=torch.Generator().manual_seed(0)) * spread
    uniform = torch.linspace(0, 0.999, 32)
    config = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=1)
    chosen, logprobs = sample(logits, uniform, config)
    ordered, order = logits.log_softmax(-1).exp().sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < 0.9
    target = uniform[:, None] * ordered.where(kept, 0.0).sum(-1, keepdim=True)
    expected = order.gather(-1, (ordered.cumsum(-1) <= target).sum(-1, keepdim=True)).squeeze(-1)
    assert chosen.tolist() == expected.tolist()
    assert torch.equal(logprobs, logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1))


def test_longest_expected_units_come_first_and_unknown_ones_count_as_the_mean():
    def longest_first(*expected: float | None) -> list[int]:
        requests = [
            GenerationRequest(prompt_ids=(5, i), seed=i, max_new_tokens=8, expected_tokens=tokens)
            for i, tokens in enumerate(expected)
        ]
        asked = [(Prompt(id=f"{i}", question="1+1", gold_answer="2"), 0) for i in range(len(expected))]
        sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=8)
        units = [[i] for i in range(len(expected))]
        call = SampleCall("step_000000", asked, requests, sampling, units=units, weight_version=0)
        return call.longest_first(range(len(units)))

    assert longest_first(None, None, None) == [0, 1, 2]
    assert longest_first(2.0, None, 8.0, 2.0) == [2, 1, 0, 3]
