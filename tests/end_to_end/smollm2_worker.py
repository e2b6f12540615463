"""One of several processes: SmolLM2 straight from its directory, greedy answers, one training step, a checkpoint.

torchrun ... smollm2_worker.py DIRECTORY TENSOR PIPELINE; DIRECTORY holds prompts.json and hf/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.checkpoint.state import weights_only
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import AdamWConfig, ParallelConfig, SamplingConfig
from oreal_megatron.data.packing import PackedSequence, TokenBatch, pack
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.policy import Policy
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.types import GenerationRequest
from tests.tiny_models import as_policy

ADAMW = AdamWConfig(
    lr=1e-4, min_lr=1e-5, warmup_steps=0, decay_steps=None, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, clip_grad=1.0
)


def main(directory: Path, tensor: int, pipeline: int) -> None:
    torch.set_num_threads(1)
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, micro_batch_tokens=512)
    with cpu_backend(), parallel_groups(layout, seed=0) as groups:
        policy = load(directory / "hf", groups)
        asked = json.loads((directory / "prompts.json").read_text())
        result = {"answers": answers(policy, asked, groups)}
        answered = [
            PackedSequence(id=str(i), prompt_ids=tuple(prompt), response_ids=tuple(answer["token_ids"]))
            for i, (prompt, answer) in enumerate(zip(asked["prompts"][:2], result["answers"], strict=False))
        ]
        batch = pack(answered, torch.device("cpu"))
        result["loss"] = train_one_step(policy, batch, groups)
        store = CheckpointStore(directory, groups, keep=1)
        store.save(f"saved_tp{tensor}pp{pipeline}", weights_only("policy", policy))
        (logprobs,) = score(policy, [batch], lambda output, b: output[b.predicting, 0].tolist(), groups)
        result["trained_logprobs"] = logprobs
        if groups.is_main:
            (directory / f"tp{tensor}pp{pipeline}.json").write_text(json.dumps(result))


def load(path: Path, groups: ParallelGroups) -> Policy:
    return as_policy(path, groups, max_sequence_length=512)


def answers(policy: Policy, asked: dict[str, Any], groups: ParallelGroups) -> list[dict[str, Any]]:
    engine = EmbeddedEngine(
        lambda: CachedDecoder(policy, groups, asked["vocab_size"]), stop_token_id=asked["stop"], batch_size=20
    )
    new = asked["max_new_tokens"]
    requests = [GenerationRequest(prompt_ids=tuple(ids), seed=0, max_new_tokens=new) for ids in asked["prompts"]]
    greedy = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=new)
    ((_, found),) = engine.generate([requests], greedy)
    return [{"token_ids": list(c.token_ids), "logprobs": list(c.logprobs)} for c in found]


def train_one_step(policy: Policy, batch: TokenBatch, groups: ParallelGroups) -> float:
    def loss(output: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, float]:
        value = -output[batch.predicting, 0].mean()
        return value, value.item()

    trained = TrainedModel(policy, ADAMW, groups, num_updates=2)
    (value,) = trained.forward_backward([batch], loss)
    trained.update()
    return float(value)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
