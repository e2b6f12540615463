"""Top-p sampling by inversion, against probabilities worked out by hand."""

from __future__ import annotations

import pytest
import torch

from oreal_megatron.config import SamplingConfig
from oreal_megatron.rollout.embedded import sample

# Most likely first: tokens 2, 0, 3, 1.
PROBABILITIES = torch.tensor([0.3, 0.05, 0.5, 0.15])


def draw(uniforms, **sampling) -> tuple[list[int], list[float]]:
    logits = PROBABILITIES.log().expand(len(uniforms), 4)
    config = SamplingConfig(**({"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1} | sampling))
    tokens, logprobs = sample(logits, torch.tensor(uniforms), config)
    return tokens.tolist(), logprobs.exp().tolist()


def test_the_cumulative_distribution_is_inverted():
    tokens, probabilities = draw([0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 0.9999999])
    assert tokens == [2, 2, 0, 0, 3, 3, 1, 1]
    assert probabilities == pytest.approx([0.5, 0.5, 0.3, 0.3, 0.15, 0.15, 0.05, 0.05])


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    # 0.5 + 0.3 reach 0.8: tokens 2 and 0, drawn as 5 to 3; the log-probabilities stay those before top-p.
    tokens, probabilities = draw([0.0, 0.62, 0.63, 0.9999999], top_p=0.8)
    assert tokens == [2, 2, 0, 0]
    assert probabilities == pytest.approx([0.5, 0.5, 0.3, 0.3])


def test_a_tiny_top_p_is_greedy():
    assert draw([0.0, 0.99], top_p=1e-6)[0] == [2, 2]


def test_temperature_scales_the_logits():
    squared = PROBABILITIES.square() / PROBABILITIES.square().sum()
    tokens, probabilities = draw([0.0], temperature=0.5)
    assert tokens == [2] and probabilities == pytest.approx([squared[2].item()])
    assert draw([0.9], temperature=0.0) == ([2], pytest.approx([0.5]))


def test_frequencies_follow_the_nucleus():
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0)).tolist()
    counts = torch.bincount(torch.tensor(draw(uniforms, top_p=0.9)[0]), minlength=4) / len(uniforms)
    torch.testing.assert_close(counts, torch.tensor([0.3, 0.0, 0.5, 0.15]) / 0.95, atol=0.01, rtol=0)
