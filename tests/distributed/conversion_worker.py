"""One of several processes of one layout: every case of a directory in turn. torchrun ... worker.py DIRECTORY

A case: load the Hugging Face directory's slices; compare logits with transformers'; load the converted checkpoint with
Megatron-Core's own loader and compare every parameter; save it with Megatron-Core's writer, from this layout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from oreal_megatron.checkpoint.state import weights_only
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import ModelConfig, ParallelConfig
from oreal_megatron.conversion.huggingface import read_model
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.data.packing import PackedSequence, TokenBatch, pack
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.gpt import build_gpt
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.reward_model import TokenRewardModel
from oreal_megatron.models.virtual_stages import chunks_of


class Logits(GPTModel):
    """Answers with its part of the logits, whether there are labels or not."""

    def forward(self, *args: Any, labels: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(*args, **options)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    layout = ParallelConfig.model_validate_json((directory / "layout.json").read_text())
    results = {}
    with cpu_backend(), parallel_groups(layout, seed=0) as groups:
        for case in sorted(path for path in directory.iterdir() if path.is_dir()):
            results[case.name] = run_case(case, groups)
        if groups.is_main:
            (directory / "results.json").write_text(json.dumps(results))


def run_case(case: Path, groups: ParallelGroups) -> dict[str, float]:
    """Largest differences over all ranks: of logits from transformers', of parameters between the two loaders."""
    direct = empty_model(case, groups)
    for chunk in chunks_of(direct):
        load_weights(chunk, case / "hf", groups)
    through_checkpoint = empty_model(case, groups)
    state = dist_checkpointing.load(through_checkpoint.sharded_state_dict(), str(case / "megatron"))
    through_checkpoint.load_state_dict({key: value for key, value in state.items() if key != "common"}, strict=True)
    pairs = list(zip(direct.named_parameters(), through_checkpoint.named_parameters(), strict=True))
    differing = sum(not torch.equal(a, b) for (_, a), (_, b) in pairs)
    CheckpointStore(case, groups, keep=1).save("saved", weights_only("policy", direct))
    everywhere = groups.gather_over_world([(logits_difference(direct, case, groups), differing)])
    return {
        "logits": max(part[0][0] for part in everywhere),
        "differing_parameters": sum(part[0][1] for part in everywhere),
        "parameters": len(pairs),
    }


def empty_model(case: Path, groups: ParallelGroups) -> torch.nn.Module:
    """The case's architecture with other, random weights."""
    model = read_model(case / "hf")
    built = build_gpt(
        Logits if model.head == "causal" else TokenRewardModel,
        model.geometry,
        ModelConfig(
            path=None,
            geometry=model.geometry,
            tokenizer="unused",
            implementation="local",
            dtype="float32",
            max_sequence_length=64,
        ),
        groups,
        vocab_size=model.geometry.vocab_size or 0,
        seed=7,
        tied_embeddings=model.geometry.tied_embeddings and model.head == "causal",
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(torch.nan)
    return built


def logits_difference(model: torch.nn.Module, case: Path, groups: ParallelGroups) -> float:
    expected = torch.load(case / "logits.pt")
    ids = expected["ids"].tolist()
    batches = [pack([PackedSequence(id="a", prompt_ids=(row[0],), response_ids=tuple(row[1:]))], torch.device("cpu"))
               for row in ids]  # fmt: skip

    def whole(output: Tensor, batch: TokenBatch) -> Tensor:
        parts = [torch.empty_like(output) for _ in range(groups.tensor_size)]
        dist.all_gather(parts, output.contiguous(), group=groups.collection.tp)
        is_split = expected["logits"].size(-1) > 1
        return torch.cat(parts, dim=-1)[0] if is_split else parts[0][0]

    found = torch.stack(score(model, batches, whole, groups))
    num_tokens = expected["logits"].size(-1)
    return (found[..., :num_tokens] - expected["logits"]).abs().max().item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
