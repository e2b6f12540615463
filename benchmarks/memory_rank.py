"""One rank of benchmarks.memory: two steps' phases of a real trainer, and the peak of each above the imports.

Updates of a policy, a reference and a reward model of 42M parameters each on packed rows of 1,024 tokens; generation on
the policy; its weights sent to a process in the place of a server; a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state  # noqa: F401,TID251  # an import of the baseline

from benchmarks.memory import SERVERS, configuration
from oreal_megatron.checkpoint.state import trained_state
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import GeometryConfig, TrainConfig
from oreal_megatron.data.packing import PackedSequence, Packer
from oreal_megatron.distributed.cpu_backend import cpu_backend, peak_memory, reset_peak_memory
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import chunks_of
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.step import update_policy, update_reward_model, with_reference, with_token_weights
from oreal_megatron.types import GenerationRequest
from oreal_megatron.weight_sync.checksums import whole
from oreal_megatron.weight_sync.p2p import Receiver, Rendezvous, Sender, join
from oreal_megatron.weight_sync.planner import ReshardingPlan, ops_by_receiver, ops_by_sender, plan_resharding
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from oreal_megatron.weight_sync.source import PolicyShards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", help="name of a layout of benchmarks/memory.py")
    name = parser.parse_args().layout
    config = configuration(name)
    torch.set_num_threads(1)
    with cpu_backend(), parallel_groups(config.parallel, seed=0) as groups:
        torch.ones(64, 64) @ torch.ones(64, 64)
        peaks = Peaks()
        run = Trainer(config, groups)
        # The second round is a step like all that follow.
        for _ in range(2):
            run.train(peaks)
            with peaks.of("generate"):
                run.generate()
            run.publish(peaks, configuration(name, *SERVERS))
            with peaks.of("save"):
                run.save()
    print("MEASURED " + json.dumps(peaks.seen), flush=True)


class Peaks:
    """MiB of this process by phase, above what it has when this is made, and seconds."""

    def __init__(self) -> None:
        self._baseline = peak_memory() or 0
        self.seen: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        reset_peak_memory()
        begun = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.seconds[phase] = time.perf_counter() - begun
        self.seen[phase] = ((peak_memory() or 0) - self._baseline) / 2**20


class Trainer:
    """The models of a run, and what it does with them."""

    def __init__(self, config: TrainConfig, groups: ParallelGroups):
        self.config, self.groups = config, groups
        geometry = config.model.geometry
        assert geometry is not None and geometry.vocab_size is not None
        self.geometry: GeometryConfig = geometry
        self.vocab_size: int = geometry.vocab_size
        policy, self.reference = (
            build_policy(geometry, config.model, groups, vocab_size=self.vocab_size, seed=0) for _ in range(2)
        )
        self.policy = TrainedModel(policy, config.optimizer.policy, groups, num_updates=10)
        reward_model = build_reward_model(geometry, config.model, groups, vocab_size=self.vocab_size, seed=0)
        self.reward_model = TrainedModel(reward_model, config.optimizer.reward_model, groups, num_updates=10)

    def train(self, peaks: Peaks) -> list[PackedSequence]:
        """Scores and both updates, on two of the longest rows a replica, as many as are in flight; the sequences."""
        config, groups, length = self.config, self.groups, self.config.model.max_sequence_length
        generator = torch.Generator().manual_seed(0)
        sequences = []
        for index in range(2 * groups.data_size):
            ids = tuple(torch.randint(0, self.vocab_size, (length,), generator=generator).tolist())
            sequences.append(
                PackedSequence(
                    id=str(index),
                    prompt_ids=ids[:64],
                    response_ids=ids[64:],
                    correct=index % 2 == 0,
                    advantage=1.0 if index % 2 == 0 else -1.0,
                    rollout_logprobs=(-9.0,) * (length - 64),
                )
            )
        batches = Packer.of_layout(groups, self.geometry, self.vocab_size).batches(sequences)
        counts = TokenCounts(
            *(sum(len(s.response_ids) for s in sequences if s.correct is c) for c in (True, False)), limit=0
        )
        with peaks.of("score"):
            batches = with_reference(self.reference, batches, groups)
        with peaks.of("train reward model"):
            scored, _ = update_reward_model(self.reward_model, batches, config.objective, num_sequences=len(sequences))
        batches = with_token_weights(batches, scored, config.objective, groups)
        with peaks.of("train policy"):
            update_policy(self.policy, batches, config.objective, counts)
        return sequences

    def generate(self) -> None:
        """One batch of responses to prompts of the longest length but for one, so that they are padded."""
        rollout = self.config.rollout
        engine = EmbeddedEngine(
            lambda: CachedDecoder(self.policy.module, self.groups, self.vocab_size),
            stop_token_id=0,
            batch_size=rollout.batch_size,
        )
        longest, new = self.config.prompt.max_prompt_tokens, rollout.sampling.max_new_tokens
        prompts = [(1 + index,) * (longest - (index == 0)) for index in range(rollout.batch_size)]
        requests = [GenerationRequest(prompt_ids=prompt, seed=0, max_new_tokens=new) for prompt in prompts]
        assert len(list(engine.generate([requests], rollout.sampling))) == 1

    def publish(self, peaks: Peaks, config: TrainConfig) -> None:
        """The direct transport's sending side and the audit's sums. config: of the run with servers."""
        assert config.rollout.sglang is not None
        shards = PolicyShards(chunks_of(self.policy.module), self.geometry, self.groups)
        plan = plan_resharding(shards.table, shards.geometry, shards.layout, SGLangLayout())
        options: dict[str, Any] = {"dtype": shards.dtype, "bucket_bytes": config.rollout.sglang.bucket_mib * 2**20}
        store, server = None, None
        if self.groups.is_main:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            rendezvous = Rendezvous("127.0.0.1", store.port, uuid.uuid4().hex, plan.num_senders, 1, timeout_seconds=120)
            server = multiprocessing.get_context("spawn").Process(target=receive, args=(rendezvous, plan, options))
            server.start()
        rendezvous = self.groups.from_main(rendezvous if self.groups.is_main else None)
        group = join(rendezvous, self.groups.rank, "gloo")
        ops = ops_by_receiver(plan.assign(1), self.groups.rank)
        with peaks.of("reshard"):
            Sender(group, rendezvous, self.groups.rank, ops, **options).send(shards.tensors())
            for tensor in shards.tensors().values():
                whole(tensor)
        if server is not None:
            server.join()
            assert server.exitcode == 0

    def save(self) -> None:
        with tempfile.TemporaryDirectory() as mine:
            directory = Path(self.groups.from_main(mine))
            state = trained_state("policy", self.policy) | trained_state("reward_model", self.reward_model)
            CheckpointStore(directory, self.groups, keep=1).save("step_000001", state)
            self.groups.barrier()


def receive(rendezvous: Rendezvous, plan: ReshardingPlan, options: dict[str, Any]) -> None:
    """The server's process: one rank of it."""
    torch.set_num_threads(1)
    group = join(rendezvous, rendezvous.num_senders, "gloo")
    parameters = {t.name: torch.zeros(t.shape, dtype=options["dtype"]) for t in plan.targets[0]}
    Receiver(group, rendezvous, 0, ops_by_sender(plan.assign(1), 0), **options).receive(parameters, lambda run: None)


if __name__ == "__main__":
    main()
