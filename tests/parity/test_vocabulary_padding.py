"""Rows of padding behind the vocabulary have no part in any distribution, on any number of tensor ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from oreal_megatron.config import ParallelConfig
from oreal_megatron.data.packing import PackedSequence, pack
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.gpt import build_gpt
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.policy import Policy, build_policy
from tests.ranks import run_ranks
from tests.tiny import FORKS
from tests.tiny_models import GEOMETRY, LOGPROB_ROUNDING, MODEL

WIDE = GEOMETRY.model_copy(update={"init_std": 0.5, "num_query_groups": 4})


def values_of(groups: ParallelGroups, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, 2] log-probabilities and entropies in nats, gradient of the final norm's weight) of one packed row."""
    policy = build_policy(WIDE, MODEL, groups, vocab_size=vocabulary, seed=0)
    batch = pack([PackedSequence("a", (1, 2), tuple(range(vocabulary)))], torch.device("cpu"))
    (values,) = score(policy, [batch], lambda output, b: output[b.predicting].clone(), groups)
    output = policy(batch.tokens, batch.positions, None, labels=batch.labels)
    output[..., 0].sum().backward()
    return values, policy.decoder.final_layernorm.weight.grad


def rank(number: int, tensor: int, vocabulary: int, path: Path) -> None:
    torch.set_num_threads(1)
    layout = ParallelConfig(tensor=tensor, pipeline=1, micro_batch_tokens=512)
    with cpu_backend(), parallel_groups(layout, seed=0) as groups:
        found = values_of(groups, vocabulary)
        if number == 0:
            torch.save(found, path)


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "vocabulary"), [(2, 7), (4, 5)])
def test_padding_rows_are_in_no_softmax(single_process, tmp_path, tensor, vocabulary):
    """Of 5 tokens on 4 ranks the last rank has nothing but padding."""
    run_ranks(tensor, rank, tensor, vocabulary, tmp_path / "found.pt", processes=FORKS)
    for mine, one in zip(torch.load(tmp_path / "found.pt"), values_of(single_process, vocabulary), strict=True):
        torch.testing.assert_close(mine, one, atol=LOGPROB_ROUNDING, rtol=0)


def test_policy_without_number_of_tokens_is_no_model(single_process):
    with pytest.raises(TypeError, match="num_tokens"):
        build_gpt(Policy, GEOMETRY, MODEL, single_process, vocab_size=105, seed=0, tied_embeddings=False)
    assert build_gpt(GPTModel, GEOMETRY, MODEL, single_process, vocab_size=105, seed=0, tied_embeddings=False)
