"""Every selected trajectory is trained exactly once on any number of ranks; packed rows hold what they should."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from oreal_megatron.config import GeometryConfig
from oreal_megatron.data.packing import (
    IGNORE,
    PackedSequence,
    Packer,
    Padding,
    SequenceCost,
    assign,
    assign_as_released,
    micro_batches,
    pack,
)

CPU = torch.device("cpu")
LINEAR = SequenceCost(per_token=1.0, per_pair=0.0, per_response_token=0.0)


def sequences(count: int, length=lambda i: 3 + i % 7) -> list[PackedSequence]:
    return [
        PackedSequence(
            id=str(i),
            prompt_ids=(10, 11),
            response_ids=tuple(range(20, 20 + length(i))),
            correct=i % 2 == 0,
            advantage=float(i),
            rollout_logprobs=tuple(-0.1 * k for k in range(length(i))),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 16, 97, 98, 99, 128])
def test_98_trajectories_are_each_trained_once_on_any_number_of_ranks(num_ranks):
    ranks = assign(sequences(98), num_ranks, LINEAR)
    assert len(ranks) == num_ranks
    ids = Counter(
        id for rank in ranks for batch in micro_batches(rank, token_budget=32, device=CPU) for id in batch.ids
    )
    assert ids == Counter(str(i) for i in range(98))


def test_dealing_balances_tokens():
    loads = [sum(s.num_tokens for s in rank) for rank in assign(sequences(98), 16, LINEAR)]
    assert max(loads) - min(loads) <= max(s.num_tokens for s in sequences(98))


def test_dealing_balances_work_rather_than_tokens():
    # Attention makes a long sequence cost twice what its tokens say.
    chosen = sequences(2, length=lambda i: 998) + sequences(40, length=lambda i: 98)
    cost = SequenceCost(per_token=1.0, per_pair=0.002, per_response_token=0.0)
    loads = [sum(map(cost.of, rank)) for rank in assign(chosen, 4, cost)]
    by_tokens = [sum(map(cost.of, rank)) for rank in assign(chosen, 4, LINEAR)]
    assert max(loads) / min(loads) < 1.05 < 1.5 < max(by_tokens) / min(by_tokens)


def test_the_cost_of_a_sequence_is_that_of_its_matrix_products():
    geometry = GeometryConfig(
        num_layers=3, hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, head_dim=5
    )
    cost = SequenceCost.of_model(geometry, vocab_size=11)
    # Queries and their projection 8 x 20 each, keys and values 8 x 10 each, three matrices of 8 x 20.
    assert cost.per_token == 2 * 3 * (160 + 160 + 80 + 80 + 3 * 160)
    assert cost.per_pair == 3 * 2 * 2 * 20 and cost.per_response_token == 2 * 8 * 11
    (sequence,) = sequences(1, length=lambda i: 3)
    assert cost.of(sequence) == 5 * cost.per_token + 15 * cost.per_pair + 3 * cost.per_response_token


def test_padding_ends_sequences_and_rows_and_carries_no_label():
    batch = pack(sequences(2, length=lambda i: 3 + i), CPU, Padding(sequence=4, row=12))
    assert batch.cu_seqlens.tolist() == [0, 8, 24] and batch.max_seqlen == 16 and batch.tokens.shape == (1, 24)
    assert batch.labels[0].tolist() == [-1, 20, 21, 22, *[-1] * 5, 20, 21, 22, 23, *[-1] * 11]
    assert batch.positions[0].tolist() == [*range(8), *range(16)]
    assert batch.predicting.numel() == sum(batch.response_lengths) == 7
    assert pack([], CPU, Padding(sequence=4, row=12)).tokens.shape == (1, 12)


@pytest.mark.parametrize("num_sequences", [0, 1, 5, 7])
def test_every_rank_gets_as_many_micro_batches_as_its_schedule_takes(num_sequences):
    packers = [
        Packer(num_ranks=3, rank=rank, token_budget=10, count_multiple=2, padding=Padding(), cost=LINEAR, device=CPU)
        for rank in range(3)
    ]
    packed = [packer.batches(sequences(num_sequences)) for packer in packers]
    assert all(batches and len(batches) % 2 == 0 for batches in packed)
    ids = Counter(id for batches in packed for batch in batches for id in batch.ids)
    assert ids == Counter(str(i) for i in range(num_sequences))


def test_the_release_trains_98_on_16_ranks_as_192():
    ids = Counter(s.id for rank in assign_as_released(sequences(98), 16) for s in rank)
    assert ids.total() == 192
    assert sorted(Counter(ids.values()).items()) == [(1, 4), (2, 94)]


def test_the_release_repeats_nothing_where_it_divides():
    ids = Counter(s.id for rank in assign_as_released(sequences(96), 16) for s in rank)
    assert ids == Counter(str(i) for i in range(96))


def test_the_release_divides_by_zero_with_too_few():
    with pytest.raises(ValueError, match=r"3 sequence\(s\) over 16 data-parallel ranks.*sampler=exact"):
        assign_as_released(sequences(3), 16)


def test_a_packed_row_by_hand():
    batch = pack(
        [
            PackedSequence(
                id="a", prompt_ids=(1, 2), response_ids=(3, 4), advantage=1.5, rollout_logprobs=(-1.0, -2.0)
            ),
            PackedSequence(id="b", prompt_ids=(5,), response_ids=(6,), correct=False, rollout_logprobs=(-3.0,)),
        ],
        CPU,
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.labels.tolist() == [[IGNORE, 3, 4, IGNORE, 6, IGNORE]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6] and batch.prefixes == ((0, 0), (4, 4)) and batch.segments == (0, 1)
    assert batch.max_seqlen == 4
    assert batch.predicting.tolist() == [1, 2, 4]
    assert batch.per_token(batch.advantages).tolist() == [1.5, 1.5, 0.0]
    assert batch.per_token(batch.correct).tolist() == [True, True, False]
    assert batch.rollout_logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert [part.tolist() for part in batch.split_by_sequence(batch.rollout_logprobs)] == [[-1.0, -2.0], [-3.0]]


def test_micro_batches_respect_the_budget_of_tokens():
    batches = micro_batches(sequences(40, length=lambda i: 60 if i == 5 else 4), token_budget=20, device=CPU)
    sizes = [batch.tokens.size(1) for batch in batches]
    assert sizes[0] == 62 and batches[0].ids == ("5",)
    assert all(size <= 20 for size in sizes[1:])


def test_a_rank_without_sequences_gets_a_batch_that_trains_nothing():
    (batch,) = micro_batches([], token_budget=20, device=CPU)
    assert batch.ids == () and batch.predicting.numel() == 0 and batch.tokens.shape == (1, 1)
    assert batch.per_token(batch.advantages).shape == (0,)


def responses(prompt, *lengths, name="s"):
    return [
        PackedSequence(
            id=f"{name}{i}",
            prompt_ids=prompt,
            response_ids=tuple(range(20, 20 + n)),
            advantage=float(n),
            rollout_logprobs=(-float(n),) * n,
        )
        for i, n in enumerate(lengths)
    ]


def test_a_row_with_a_shared_prompt_by_hand():
    others = responses((9, 8), 2, name="alone")
    batch = pack([*responses((5, 6, 7), 2, 1), *others], CPU, shares_prompts=True)
    assert batch.ids == ("s0", "s1", "alone0")
    # The last token of the prompt predicts the first of each response, and is there for each.
    assert batch.tokens.tolist() == [[5, 6, 7, 20, 21, 7, 20, 9, 8, 20, 21]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3]]
    assert batch.labels[0].tolist() == [-1, -1, 20, 21, -1, 20, -1, -1, 20, 21, -1]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 11]
    assert batch.prefixes == ((0, 0), (0, 2), (0, 2), (7, 7)) and batch.segments == (1, 2, 3)
    assert batch.max_seqlen == 5
    assert [[part.tolist() for part in batch.ids_of(n)] for n in range(3)] == [
        [[5, 6, 7], [20, 21]],
        [[5, 6, 7], [20]],
        [[9, 8], [20, 21]],
    ]
    assert batch.per_token(batch.advantages).tolist() == [2.0, 2.0, 1.0, 2.0, 2.0]
    assert batch.rollout_logprobs.tolist() == [-2.0, -2.0, -1.0, -2.0, -2.0]


@pytest.mark.parametrize("budget", [1, 30, 64, 10_000])
def test_prompts_are_shared_within_the_budget_and_nothing_is_lost(budget):
    chosen = [s for n in range(6) for s in responses(tuple(range(n, n + 12)), *range(1, 9), name=f"{n}-")]
    batches = micro_batches(chosen, token_budget=budget, device=CPU, shares_prompts=True)
    found = {id: batch.ids_of(n) for batch in batches for n, id in enumerate(batch.ids)}
    assert sum(len(batch.ids) for batch in batches) == len(found) == len(chosen)
    for sequence in chosen:
        prompt, response = found[sequence.id]
        assert tuple(prompt.tolist()) == sequence.prompt_ids and tuple(response.tolist()) == sequence.response_ids
    assert all(len(batch.ids) == 1 or batch.tokens.size(1) <= budget for batch in batches)
    tokens = sum(batch.tokens.size(1) for batch in batches)
    # Six prompts of 11 tokens, once each, where all fits; nothing is shared where a micro-batch holds one sequence.
    whole = sum(sequence.num_tokens for sequence in chosen)
    if budget in (1, 10_000):
        assert tokens == (whole if budget == 1 else whole - 6 * 7 * 11)
    else:
        assert whole - 6 * 7 * 11 <= tokens < whole


def test_prompts_of_long_responses_stay_whole():
    batch = pack(responses(tuple(range(20)), 400, 500), CPU, shares_prompts=True)
    assert batch.tokens.size(1) == 940 and batch.max_seqlen == 520


def test_ranks_get_whole_prompts_where_there_are_many_and_equal_work_where_there_are_few():
    many = [s for n in range(32) for s in responses((n, 1, 2, 3), 4, 4, 4, 4, name=f"{n}-")]
    for rank in assign(many, 4, LINEAR, shares_prompts=True):
        assert set(Counter(sequence.prompt_ids for sequence in rank).values()) == {4}
    few = responses((1, 2, 3), *[4] * 32)
    assert [len(rank) for rank in assign(few, 4, LINEAR, shares_prompts=True)] == [8] * 4


def test_a_shared_prompt_counts_once_in_the_balance_of_ranks():
    long_prompts = responses(tuple(range(100)), *[10] * 8)
    short_prompts = [s for n in range(8) for s in responses((n, 1), *[10] * 4, name=f"{n}-")]
    ranks = assign([*long_prompts, *short_prompts], 2, LINEAR, shares_prompts=True)
    rows = [sum(b.tokens.size(1) for b in micro_batches(rank, 10_000, CPU, shares_prompts=True)) for rank in ranks]
    assert max(rows) - min(rows) <= 110


def test_a_prompt_that_the_budget_leaves_with_few_responses_stays_whole():
    chosen = responses(tuple(range(180)), *[1400] * 16)
    batches = micro_batches(chosen, token_budget=3300, device=CPU, shares_prompts=True)
    assert len(batches) == 8 and all(batch.tokens.size(1) == 2 * 1580 for batch in batches)
