"""The tokens of a step's responses: the main rank has all of them, and every replica gets those that it trains on."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oreal_megatron.config import ParallelConfig, SamplingConfig, parse_config
from oreal_megatron.data.packing import PackedSequence, Packer, Padding, SequenceCost, pack
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, on_every_rank, rollout_seeds
from oreal_megatron.step import with_token_weights
from oreal_megatron.stopping import StopRequest
from oreal_megatron.train import selected
from oreal_megatron.types import Completion, FinishReason, Prompt, Trajectory, Verdict, WeightSpan
from tests.conftest import compose
from tests.graded import graded
from tests.ranks import run_ranks
from tests.unit.rollout.test_journal import Renderer, grade

LAYOUT = ParallelConfig(tensor=1, pipeline=2, micro_batch_tokens=64)
PROMPTS = [Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(6)]


class Engine:
    """Responses of 3 to 8 tokens, a unit a prompt."""

    weight_version = 0

    def units(self, requests):
        return [[2 * i, 2 * i + 1] for i in range(len(requests) // 2)]

    def generate(self, units, sampling, is_enough=None):
        for index, unit in enumerate(units):
            yield index, [self._completion(request.prompt_ids[1] + 3) for request in unit]

    def _completion(self, length):
        return Completion(
            token_ids=tuple(range(100, 100 + length)),
            logprobs=tuple(np.float32([-0.1 * i for i in range(length)]).tolist()),
            finish_reason=FinishReason.LENGTH,
            weight_spans=(WeightSpan(version=0, start=0, end=length),),
        )


def exchanged(rank: int, directory: Path) -> None:
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        sampler = Sampler(
            Engine(),
            Renderer(),
            grade,
            RolloutJournal(directory, groups),
            groups,
            StopRequest(),
            max_sequence_length=64,
            undecided=None,
        )
        graded = sampler.sample(
            PROMPTS,
            batch_name="step_000000",
            num_samples=2,
            sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=8),
            seed_of=rollout_seeds(0, "train", 0),
        ).groups
        rollouts = [one.rollout for group in graded for one in group]
        assert [rollout.id for rollout in rollouts] == [f"{prompt.id}#{i}" for prompt in PROMPTS for i in (0, 1)]
        lengths = [3 + int(rollout.prompt.id) for rollout in rollouts]
        assert [rollout.num_response_tokens for rollout in rollouts] == lengths
        assert [len(rollout.response_ids) for rollout in rollouts] == (lengths if groups.is_main else [0] * 12)
        packer = Packer(
            num_ranks=2, rank=groups.data_rank, token_budget=16, count_multiple=1, padding=Padding(),
            cost=SequenceCost(1.0, 0.0, 0.0), device=torch.device("cpu"),
        )  # fmt: skip
        sequences = [
            PackedSequence.from_trajectory(Trajectory(rollout=one, correct=True, advantage=1.0), weight_version=0)
            for one in rollouts
        ]
        batches = packer.batches_from_main(sequences, groups)
        for batch in batches:
            for id, logprobs in zip(batch.ids, batch.split_by_sequence(batch.rollout_logprobs), strict=True):
                expected = torch.tensor([-0.1 * i for i in range(3 + int(id.split("#")[0]))])
                assert torch.equal(logprobs, expected)
        parts = groups.gather_over_world([(groups.data_rank, id) for batch in batches for id in batch.ids])
        assert parts[0] == parts[2] and parts[1] == parts[3]  # stages of a replica train on the same
        assert sorted(id for _, id in parts[0] + parts[1]) == sorted(rollout.id for rollout in rollouts)


def test_every_replica_gets_what_it_trains_on(tmp_path):
    run_ranks(4, exchanged, tmp_path, processes=multiprocessing.get_context("spawn"))


def weigh_by_rank(scores_T, *, correct, config, prompt_ids, response_ids):
    """A user's function that draws, and fails for the sequence of one replica."""
    if int(prompt_ids[0]) == 1:
        raise IndexError("no such token")
    return torch.rand(len(scores_T))


def weighed(rank: int) -> None:
    torch.manual_seed(rank)
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        path = f"objective.functions.token_weights={__name__}.weigh_by_rank"
        config = parse_config(compose("objective=oreal", path)).objective
        for failing in (False, True):
            first = groups.data_rank if failing else 5
            part = PackedSequence(
                id=f"p{groups.data_rank}", prompt_ids=(first, 7), response_ids=(8, 9), rollout_logprobs=(0.0, 0.0)
            )
            batch = pack([part], torch.device("cpu"))
            if failing:
                with pytest.raises((ValueError, OSError), match="weigh_by_rank raised IndexError: no such token"):
                    with_token_weights([batch], None, config, groups)
            else:
                (found,) = with_token_weights([batch], None, config, groups)
                parts = groups.gather_over_world([(groups.data_rank, found.token_weights.tolist())])
                assert parts[0] == parts[2] and parts[1] == parts[3] and parts[0] != parts[1]


def test_a_replica_weighs_its_tokens_once_and_an_error_ends_every_rank():
    run_ranks(4, weighed, processes=multiprocessing.get_context("spawn"))


def advantages_by_text(*, responses):
    """A user's function that reads what the main rank alone has."""
    assert all(one.rollout.text and len(one.rollout.response_ids) for one in responses)
    return [float(len(one.rollout.text)) if one.is_correct else -1.0 for one in responses]


def with_text(*, trajectories, rng):
    return [trajectory for trajectory in trajectories if trajectory.rollout.text]


def selected_on_every_rank(rank: int) -> None:
    functions = f"advantages: {__name__}.advantages_by_text, choose: {__name__}.with_text"
    functions += ", keep_group: null, token_weights: null, policy_loss: null, kl: null"
    config = parse_config(compose("objective=grpo", f"objective.functions={{{functions}}}"))
    verdicts = (Verdict.CORRECT, Verdict.INCORRECT, Verdict.CORRECT)
    prompts = [Prompt(id=f"p{index}", question="q", gold_answer="1") for index in range(2)]
    groups_of = [
        [graded(prompt, i, verdict, 2 + i, text="x" * (i + 1)) for i, verdict in enumerate(verdicts)]
        for prompt in prompts
    ]
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        run = SimpleNamespace(config=config, progress=SimpleNamespace(step=0), global_rng=None, groups=groups)
        selection = selected(run, on_every_rank(groups_of, groups))
        mine = [(one.id, one.correct, one.advantage, one.rollout.num_response_tokens) for one in selection.trajectories]
        everyone = groups.gather_over_world([(mine, selection.num_kept_groups)])
        assert len(mine) == 6 and all(found == everyone[0] for found in everyone)
        assert (len(selection.trajectories[0].rollout.text) == 1) is groups.is_main


def test_functions_that_read_texts_select_the_same_on_every_rank():
    run_ranks(2, selected_on_every_rank, processes=multiprocessing.get_context("spawn"))
