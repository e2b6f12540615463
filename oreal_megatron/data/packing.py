"""Packing of trajectories: their distribution over ranks, and the micro-batches that are fed to the models.

A packed row holds whole sequences (prompt, then response) end to end. The values of a token are stored at the position
that PREDICTS it: position j carries label, advantage and outcome of token j + 1. Where a layout needs lengths of some
multiple, a sequence ends with padding, which no real token attends to under a causal mask and which carries no label.

With `shares_prompts`, which local layers on a CPU have, the responses to a prompt share it: the row holds the prompt
but for its last token once, as a segment of its own, and then a segment for each response, which begins with the
prompt's last token, since that token predicts each response's first one.
Shapes: T tokens of a micro-batch, R of them predicting a response token, N sequences, S segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from oreal_megatron.config import Fp8Config, GeometryConfig
from oreal_megatron.config.fp8_recipes import RECIPES
from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.types import Rollout, Trajectory

IGNORE = -1
"""Label of positions that do not predict a response token."""

MIN_SHARED = 0.1
"""Share of a prompt group's tokens that one prompt for all has to save. Prompts of long responses stay whole: attention
to a prefix needs a mask of a response's length squared."""

S = TypeVar("S")


@dataclass(frozen=True)
class PackedSequence:
    """A sequence to train on or to score; the policy terms read `correct`, `advantage` and `rollout_logprobs`."""

    id: str
    prompt_ids: Sequence[int] | np.ndarray
    response_ids: Sequence[int] | np.ndarray
    correct: bool = True
    advantage: float = 0.0
    rollout_logprobs: Sequence[float] | np.ndarray = ()
    num_older_tokens: int = 0
    """Number of response tokens, at the start, that weights of earlier steps generated."""
    loss_mask: np.ndarray | None = None
    """Response tokens that are trained, bool [T], for a response of several turns; None: all. `rollout_logprobs` and
    `num_older_tokens` are of trained tokens alone."""

    @property
    def num_trained_tokens(self) -> int:
        return len(self.response_ids) if self.loss_mask is None else int(self.loss_mask.sum())

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @classmethod
    def from_rollout(
        cls, rollout: Rollout, *, correct: bool, advantage: float = 0.0, num_older_tokens: int = 0
    ) -> PackedSequence:
        """Makes the sequence of a rollout. A reward model needs no more than `correct`."""
        return cls(
            id=rollout.id,
            prompt_ids=rollout.prompt_ids,
            response_ids=rollout.response_ids,
            correct=correct,
            advantage=advantage,
            rollout_logprobs=rollout.logprobs,
            num_older_tokens=num_older_tokens,
            loss_mask=rollout.policy_mask if len(rollout.response_ids) else None,
        )

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, *, weight_version: int) -> PackedSequence:
        """Makes the sequence of a trajectory. weight_version: version of the step's weights."""
        rollout = trajectory.rollout
        return cls.from_rollout(
            rollout,
            correct=trajectory.correct,
            advantage=trajectory.advantage,
            num_older_tokens=rollout.num_older_tokens(weight_version),
        )


@dataclass(frozen=True)
class TokenBatch:
    """A packed micro-batch."""

    ids: tuple[str, ...]
    """Ids of the N sequences."""
    tokens: Tensor
    """Token ids, int64 [1, T]."""
    positions: Tensor
    """Positions of tokens in their sequences, int64 [1, T]; those after a shared prompt go on where it ends."""
    labels: Tensor
    """Next token where it is a response token, IGNORE elsewhere; int64 [1, T]."""
    cu_seqlens: Tensor
    """Bounds of the segments, int32 [S + 1]: of the N sequences, and of prompts that several share."""
    prefixes: tuple[tuple[int, int], ...]
    """Start and end in the row of the tokens that each of the S segments continues; equal where there are none."""
    segments: tuple[int, ...]
    """Segment of each of the N sequences."""
    max_seqlen: int
    """Length of the longest sequence, with its prefix."""
    response_lengths: tuple[int, ...]
    """Trained response tokens of each of the N sequences; they sum to R."""
    correct: Tensor
    """Whether each response is correct, bool [N]."""
    advantages: Tensor
    """Advantage of each response, fp32 [N]."""
    rollout_logprobs: Tensor
    """Log-probabilities at generation, fp32 [R], nats."""
    is_older: Tensor
    """Whether weights of earlier steps generated the token, bool [R]."""
    reference_logprobs: Tensor | None = None
    """Log-probabilities of the frozen initial policy, fp32 [R], nats; None until the reference has scored the batch."""
    old_logprobs: Tensor | None = None
    """Log-probabilities of the policy before the step's first update, fp32 [R], nats; None in a step of one update."""
    token_weights: Tensor | None = None
    """Token weights, fp32 [R]; None until the reward model has scored the batch."""
    token_scores: Tensor | None = None
    """Scores of the reward model that the token weights come from, fp32 [R]; None without a reward model."""

    @property
    def predicting(self) -> Tensor:
        """Positions that predict a response token, sequence by sequence; int64 [R]."""
        return torch.where(self.labels[0] != IGNORE)[0]

    def ids_of(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Returns the ids of a sequence's prompt and of its trained response tokens, int64 [P] and [T].

        The prompt ends where the first trained token begins.
        """
        segment, length = self.segments[sequence], self.response_lengths[sequence]
        first = sum(self.response_lengths[:sequence])
        predicting = self.predicting[first : first + length]
        prefix, own = slice(*self.prefixes[segment]), slice(int(self.cu_seqlens[segment]), int(predicting[0]) + 1)
        prompt = torch.cat([self.tokens[0, prefix], self.tokens[0, own]])
        return prompt, self.labels[0, predicting]

    def split_by_sequence(self, per_token: Tensor) -> list[Tensor]:
        """Splits [R] into N parts, the response tokens of each sequence."""
        return list(per_token.split(list(self.response_lengths))) if self.ids else []

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """Repeats the value of each sequence at its response tokens: [N] -> [R]."""
        lengths = torch.tensor(self.response_lengths, dtype=torch.int64, device=per_sequence.device)
        return per_sequence.repeat_interleave(lengths)


@dataclass(frozen=True)
class Padding:
    """Multiples to which lengths are filled up, in tokens."""

    sequence: int = 1
    """Multiple of every sequence's length."""
    row: int = 1
    """Multiple of a row's length, itself a multiple of `sequence`; the row's last sequence is filled up to it."""

    def __post_init__(self) -> None:
        if self.row % self.sequence:
            raise ValueError(
                f"padding: the row multiple {self.row} is no multiple of the sequence multiple {self.sequence}"
            )

    def of(self, num_tokens: int) -> int:
        """Returns the padded length of a sequence."""
        return -(-num_tokens // self.sequence) * self.sequence


NO_PADDING = Padding()


@dataclass(frozen=True)
class SequenceCost:
    """Work of a sequence, in floating-point operations of a forward pass."""

    per_token: float
    """Operations of the layers' matrix products per token."""
    per_pair: float
    """Operations of attention per pair of a query and a key."""
    per_response_token: float
    """Operations of the output layer, which sees response tokens only."""

    @classmethod
    def of_model(cls, g: GeometryConfig, vocab_size: int) -> SequenceCost:
        """Counts the matrix products of a dense decoder, two operations per multiply-add."""
        head_dim = g.attention_head_dim
        queries = g.num_attention_heads * head_dim
        attention = g.hidden_size * 2 * (queries + g.num_query_groups * head_dim)
        return cls(
            per_token=2.0 * g.num_layers * (attention + 3 * g.hidden_size * g.ffn_hidden_size),
            per_pair=4.0 * g.num_layers * queries,
            per_response_token=2.0 * g.hidden_size * vocab_size,
        )

    def of(self, sequence: PackedSequence) -> float:
        """Returns the work of a sequence."""
        return self.of_tokens(sequence.num_tokens) + sequence.num_trained_tokens * self.per_response_token

    def of_tokens(self, count: int) -> float:
        """Returns the work of the layers for the first `count` tokens of a sequence."""
        pairs = count * (count + 1) / 2
        return count * self.per_token + pairs * self.per_pair


@dataclass(frozen=True)
class Packer:
    """Packs a step's sequences into the micro-batches of a rank."""

    num_ranks: int
    """Number of data-parallel ranks."""
    rank: int
    """Data-parallel rank whose micro-batches are packed."""
    token_budget: int
    """Tokens of a micro-batch (parallel.micro_batch_tokens)."""
    count_multiple: int
    """Multiple of the number of micro-batches that the pipeline schedule needs."""
    padding: Padding
    cost: SequenceCost
    device: torch.device
    shares_prompts: bool = False
    """Whether a prompt is in a row once for all its responses."""

    @classmethod
    def of_layout(
        cls,
        groups: ParallelGroups,
        geometry: GeometryConfig,
        vocab_size: int,
        *,
        fp8: Fp8Config | None = None,
        can_share_prompts: bool = False,
    ) -> Packer:
        """Makes the packer of a layout.

        fp8: the models share the micro-batches, so rows suit the recipes of all. can_share_prompts: whether the models'
        attention reads prefixes. Rows share no prompts under context parallelism, which cuts them, nor on a GPU, where
        the mask of a prefix rules out the flash kernel and adding up a prefix's gradient has no fixed order.
        """
        rank_tokens = math.lcm(*(RECIPES[model.recipe].tokens for model in fp8.models.values())) if fp8 else 1
        return cls(
            num_ranks=groups.data_size,
            rank=groups.data_rank,
            token_budget=groups.layout.micro_batch_tokens,
            count_multiple=groups.micro_batch_multiple,
            padding=Padding(groups.sequence_multiple, groups.row_multiple(rank_tokens)),
            cost=SequenceCost.of_model(geometry, vocab_size),
            device=device(),
            shares_prompts=can_share_prompts and groups.context_size == 1 and device().type == "cpu",
        )

    def batches(self, sequences: Sequence[PackedSequence]) -> list[TokenBatch]:
        """Returns this rank's share of sequences that every rank passes, as micro-batches; the last ones may be empty.

        The content of a step's responses is on the main rank only: see `batches_from_main`.
        """
        return self._filled(self._assigned(sequences)[self.rank])

    def batches_from_main(
        self, sequences: Sequence[PackedSequence], groups: ParallelGroups, *, as_released: bool = False
    ) -> list[TokenBatch]:
        """Returns this rank's share of the main rank's sequences, as `batches` does. Every rank calls it.

        sequences: read on the main rank only. as_released: distributes sequences as the release does, which repeats
        some of them.

        Raises:
            ValueError, OSError: as_released, and there are fewer sequences than ranks.
        """
        parts = None
        with groups.together():
            if groups.is_main and as_released:
                parts = assign_as_released(sequences, self.num_ranks)
            elif groups.is_main:
                parts = self._assigned(sequences)
        return self._filled(groups.scatter_from_main(parts))

    def _assigned(self, sequences: Sequence[PackedSequence]) -> list[list[PackedSequence]]:
        return assign(sequences, self.num_ranks, self.cost, shares_prompts=self.shares_prompts)

    def _filled(self, mine: Sequence[PackedSequence]) -> list[TokenBatch]:
        filled = micro_batches(mine, self.token_budget, self.device, self.padding, shares_prompts=self.shares_prompts)
        missing = -len(filled) % self.count_multiple
        return filled + [pack([], self.device, self.padding) for _ in range(missing)]


@dataclass(frozen=True)
class _Unit:
    """Sequences that a row holds next to each other; several have one prompt."""

    sequences: tuple[PackedSequence, ...]

    @property
    def prefix_length(self) -> int:
        """Number of tokens that the sequences share: those of the prompt but for the last."""
        return len(self.sequences[0].prompt_ids) - 1 if len(self.sequences) > 1 else 0

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence after the shared ones."""
        return [sequence.num_tokens - self.prefix_length for sequence in self.sequences]

    def num_tokens(self, padding: Padding) -> int:
        """Returns the tokens of a row that the unit takes."""
        return self.prefix_length + sum(padding.of(length) for length in self.lengths)

    def of_at_most(self, num_tokens: int, padding: Padding) -> list[_Unit]:
        """Splits the unit into units of at most `num_tokens`, where a sequence does not alone have more.

        A part whose shared prompt would save too little has sequences by themselves.
        """
        parts: list[list[PackedSequence]] = []
        size = 0
        for sequence, length in zip(self.sequences, self.lengths, strict=True):
            if parts and size + padding.of(length) <= num_tokens:
                parts[-1].append(sequence)
                size += padding.of(length)
            else:
                parts.append([sequence])
                size = self.prefix_length + padding.of(length)
        return [one for part in parts for one in _Unit(tuple(part)).if_worth_it()]

    def if_worth_it(self) -> list[_Unit]:
        """Returns the unit if its shared prompt saves enough, otherwise each sequence by itself."""
        whole = sum(sequence.num_tokens for sequence in self.sequences)
        if self.prefix_length * (len(self.sequences) - 1) >= MIN_SHARED * whole:
            return [self]
        return [_Unit((sequence,)) for sequence in self.sequences]

    def work(self, cost: SequenceCost) -> float:
        """Returns the work of the sequences, with that of the shared prompt once."""
        copies = len(self.sequences) - 1
        return sum(map(cost.of, self.sequences)) - copies * cost.of_tokens(self.prefix_length)


def _units(sequences: Sequence[PackedSequence], *, shares_prompts: bool) -> list[_Unit]:
    """Returns the sequences of each prompt as a unit where a shared prompt saves enough, otherwise each by itself."""
    if not shares_prompts:
        return [_Unit((sequence,)) for sequence in sequences]
    by_prompt: dict[bytes, list[PackedSequence]] = {}
    for sequence in sequences:
        by_prompt.setdefault(np.asarray(sequence.prompt_ids, np.int64).tobytes(), []).append(sequence)
    return [unit for group in by_prompt.values() for unit in _Unit(tuple(group)).if_worth_it()]


def pack(
    sequences: Sequence[PackedSequence],
    device: torch.device,
    padding: Padding = NO_PADDING,
    *,
    shares_prompts: bool = False,
) -> TokenBatch:
    """Lays whole sequences end to end; without any, makes a row of padding that trains nothing.

    shares_prompts: lays the sequences of a prompt next to each other after one copy of it, where that saves enough.
    """
    return _row(_units(sequences, shares_prompts=shares_prompts), device, padding)


def _row(units: Sequence[_Unit], device: torch.device, padding: Padding) -> TokenBatch:
    bounds = [0]
    prefixes: list[tuple[int, int]] = []
    segments: list[int] = []
    for unit in units:
        prefix = (bounds[-1], bounds[-1] + unit.prefix_length)
        if unit.prefix_length:
            prefixes.append((prefix[0], prefix[0]))
            bounds.append(prefix[1])
        for length in unit.lengths:
            segments.append(len(prefixes))
            prefixes.append(prefix)
            bounds.append(bounds[-1] + padding.of(length))
    if not units:
        prefixes.append((0, 0))
        bounds.append(padding.of(1))
    bounds[-1] += -bounds[-1] % padding.row
    lengths = np.diff(bounds)
    prefix_lengths = np.array([end - start for start, end in prefixes])
    # A segment's positions go on where its prefix ends.
    positions_T = np.arange(bounds[-1]) + np.repeat(prefix_lengths - bounds[:-1], lengths)
    tokens_T = np.zeros(bounds[-1], np.int64)
    labels_T = np.full(bounds[-1], IGNORE, np.int64)
    sequences = [sequence for unit in units for sequence in unit.sequences]
    for sequence, segment in zip(sequences, segments, strict=True):
        start, shared = bounds[segment], prefix_lengths[segment]
        response, end = start + len(sequence.prompt_ids) - shared, start + sequence.num_tokens - shared
        tokens_T[slice(*prefixes[segment])] = sequence.prompt_ids[:shared]
        tokens_T[start:response] = sequence.prompt_ids[shared:]
        tokens_T[response:end] = labels_T[response - 1 : end - 1] = sequence.response_ids
        if sequence.loss_mask is not None:
            labels_T[response - 1 : end - 1][~sequence.loss_mask] = IGNORE
    logprobs = [np.asarray(sequence.rollout_logprobs, np.float32) for sequence in sequences]
    is_older = [np.arange(sequence.num_trained_tokens) < sequence.num_older_tokens for sequence in sequences]
    return TokenBatch(
        ids=tuple(sequence.id for sequence in sequences),
        tokens=torch.from_numpy(tokens_T[None]).to(device),
        positions=torch.from_numpy(positions_T[None]).to(device),
        labels=torch.from_numpy(labels_T[None]).to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        prefixes=tuple(prefixes),
        segments=tuple(segments),
        max_seqlen=int((prefix_lengths + lengths).max()),
        response_lengths=tuple(sequence.num_trained_tokens for sequence in sequences),
        correct=torch.tensor([sequence.correct for sequence in sequences], dtype=torch.bool, device=device),
        advantages=torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32, device=device),
        rollout_logprobs=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *logprobs])).to(device),
        is_older=torch.from_numpy(np.concatenate([np.zeros(0, bool), *is_older])).to(device),
    )


def micro_batches(
    sequences: Sequence[PackedSequence],
    token_budget: int,
    device: torch.device,
    padding: Padding = NO_PADDING,
    *,
    shares_prompts: bool = False,
) -> list[TokenBatch]:
    """Fills micro-batches of at most `token_budget` tokens; a longer sequence gets a micro-batch of its own.

    Sequences, or with shares_prompts those of a prompt together, are placed longest first, each into the first
    micro-batch with room. The budget counts padded sequences, without the padding of the whole row. There is at least
    one micro-batch, so that a rank without sequences still takes part in the collectives of an update.
    """
    units = [
        part
        for unit in _units(sequences, shares_prompts=shares_prompts)
        for part in unit.of_at_most(token_budget, padding)
    ]
    bins: list[list[_Unit]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda unit: -unit.num_tokens(NO_PADDING)):
        length = unit.num_tokens(padding)
        index = next((i for i, left in enumerate(room) if left >= length), None)
        if index is None:
            bins.append([])
            room.append(token_budget)
            index = len(bins) - 1
        bins[index].append(unit)
        room[index] -= length
    return [_row(bin, device, padding) for bin in bins or [[]]]


def assign(
    sequences: Sequence[PackedSequence], num_ranks: int, cost: SequenceCost, *, shares_prompts: bool = False
) -> list[list[PackedSequence]]:
    """Assigns every sequence to exactly one rank: costliest first, each to the rank with the least work so far.

    shares_prompts: keeps sequences that would share a prompt together, up to a quarter of the mean number of a rank.
    """
    most = max(1, len(sequences) // (4 * num_ranks))
    units = [
        _Unit(unit.sequences[start : start + most])
        for unit in _units(sequences, shares_prompts=shares_prompts)
        for start in range(0, len(unit.sequences), most)
    ]
    work = [unit.work(cost) for unit in units]
    ranks: list[list[PackedSequence]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for index in sorted(range(len(units)), key=lambda index: -work[index]):
        rank = load.index(min(load))
        ranks[rank] += units[index].sequences
        load[rank] += work[index]
    return ranks


def assign_as_released(sequences: Sequence[S], num_ranks: int) -> list[list[S]]:
    """Assigns sequences as the release's sampler does, which repeats some of them: for `oreal_release` only.

    Its batch is b = floor(n / ranks) * ranks, and n is rounded UP to a multiple of b: 98 sequences on 16 ranks
    give b = 96 and 192 trained, while the denominators count 98.

    Raises:
        ValueError: there are fewer sequences than ranks, where the release divides by zero.
    """
    batch = len(sequences) // num_ranks * num_ranks
    if not batch:
        raise ValueError(
            f"objective.sampler=release cannot split {len(sequences)} sequence(s) over {num_ranks} data-parallel ranks "
            "(the release divides by zero here); set objective.sampler=exact"
        )
    total = -(-len(sequences) // batch) * batch
    repeated = [sequences[index % len(sequences)] for index in range(total)]
    return [repeated[rank::num_ranks] for rank in range(num_ranks)]
