"""Measures what one rank holds and computes with, on the real modules and without memory.

The tensors are fake: they have shapes and no data. The modules of a rank are built by the code that a run builds them
with, and their parameters are counted. A micro-batch of one longest row is then sent forward and backward through real
layers, while every storage that operations allocate is counted until it is freed. Transformer Engine's layers do not
run without CUDA: Megatron-Core's local layers, which keep at least as many bytes, are measured in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oreal_megatron.config import GeometryConfig, ModelConfig, ParallelConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.fake_groups import fake_groups
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.gpt import DTYPES
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.packed_row import PackedRow
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of
from oreal_megatron.planner.footprints import ActivationBytes, DecodedBatch, RankFootprint


@dataclass(frozen=True)
class MemoryProfiler:
    """Measures the ranks of a model's layouts."""

    geometry: GeometryConfig
    model: ModelConfig
    draw: Callable[[Tensor], object]
    """Chooses the next token of a sequence from fp32 logits [1, V]; measured where the model itself generates."""
    on_cpu: bool = False
    """Whether the run will be on a CPU, where log-probabilities are computed in smaller tiles."""

    def stages(self, layout: ParallelConfig, row_tokens: int, batch: DecodedBatch | None) -> list[RankFootprint]:
        """Returns one footprint a pipeline stage; the tensor, context and data ranks of a stage are alike.

        Args:
            row_tokens: tokens of a micro-batch's packed row, before context parallelism splits it.
            batch: the batch that is generated on the model itself; None where servers generate.

        Raises:
            ValueError: Megatron-Core refuses the layout.
        """
        # Where the weights come from and which kernels run make no difference here, so they are left out of the
        # cache's key.
        model = self.model.model_copy(update={"implementation": "local", "path": None, "tokenizer": ""})
        layout_ends = {0, layout.pipeline - 1}
        measured: dict[int, RankFootprint] = {}
        with cpu_backend():
            for stage in range(layout.pipeline):
                # Stages between the first and the last hold the same number of the same layers.
                like = stage if stage in layout_ends else 1
                if like not in measured:
                    footprint = _stage(self.geometry, model, layout, like, row_tokens, self.on_cpu)
                    if batch is not None:
                        cache, running = self._decoding(model, layout, footprint, batch)
                        footprint = replace(footprint, decoding_cache=cache, decoding_running=running)
                    measured[like] = footprint
        return [measured[s if s in layout_ends else 1] for s in range(layout.pipeline)]

    def _decoding(
        self, model: ModelConfig, layout: ParallelConfig, footprint: RankFootprint, batch: DecodedBatch
    ) -> tuple[int, int]:
        """Returns (bytes of the cache, most other bytes) of generation.

        Extrapolates from one and two layers: every layer keeps its cache, and only one layer runs at a time.
        """
        (one_cache, _), (two_cache, two_running) = (
            _decoded_batch(self.geometry, model, layout, footprint.stage, batch, n) for n in (1, 2)
        )
        cache = two_cache - one_cache
        logits = torch.zeros(1, self.geometry.vocab_size or 0)
        with StorageCounter() as drawing:
            self.draw(logits)
        drawn = batch.num_sequences * (logits.nbytes + drawing.peak)
        return footprint.num_layers * cache, max(two_cache + two_running - 2 * cache, drawn)


@functools.cache
def _decoded_batch(
    geometry: GeometryConfig, model: ModelConfig, layout: ParallelConfig, stage: int, batch: DecodedBatch, layers: int
) -> tuple[int, int]:
    """Measures a stage of `layers` layers: the cache after the first token, and the peak of all other bytes."""
    with _sampled_stage(layout, stage) as (_, groups):
        decoder = CachedDecoder(_policy(geometry, model, groups, layers), groups, geometry.vocab_size or 0)
        # Prompts of different lengths are padded, and need a mask.
        prompts = [(0,) * batch.prompt_tokens] * batch.num_sequences
        prompts[-1] = prompts[-1][: max(batch.prompt_tokens - 1, 1)]
        with StorageCounter() as counter:
            decoder.prefill(prompts, batch.new_tokens)
            decoder.step(torch.zeros(batch.num_sequences, dtype=torch.int64))
            kept = counter.now
    return kept, counter.peak - kept


@functools.cache
def _stage(
    geometry: GeometryConfig, model: ModelConfig, layout: ParallelConfig, stage: int, row_tokens: int, on_cpu: bool
) -> RankFootprint:
    """Measures the first rank of a stage, without generation."""
    replica = layout.tensor * layout.context * layout.pipeline
    rank = stage * layout.tensor * layout.context
    with fake_groups(layout, rank=rank, world=replica) as groups, FakeTensorMode(allow_non_fake_inputs=True):
        policy = _policy(geometry, model, groups)
        reward_model = build_reward_model(geometry, model, groups, vocab_size=_vocab_size(geometry), seed=None)
        num_layers = sum(len(chunk.decoder.layers) for chunk in chunks_of(policy))
        counted = {"policy_parameters": _count(policy), "reward_model_parameters": _count(reward_model)}
        largest = max(parameter.numel() for parameter in policy.parameters())
        gated = sum(p.numel() for name, p in policy.named_parameters() if name.endswith("mlp.linear_fc1.weight"))
    # Layers are alike: the bytes that one and two of them keep give those of any number. A context rank's part of a
    # row is measured as a row of its own; the keys and values that it gathers from the other ranks are added below.
    through_layers, head = [], ActivationBytes(0, 0, 0)
    for num_sampled in (1, 2):
        with _sampled_stage(layout, stage) as (sample, groups):
            module = chunks_of(_policy(geometry, model, groups, num_sampled, on_cpu=on_cpu))[0]
            through_layers.append(_through_layers(module, sample, row_tokens // layout.context))
            if module.post_process and num_sampled == 2:
                assert isinstance(module, Policy)
                head = _through_head(module, sample, row_tokens // layout.context)
    one, two = through_layers
    gathered = _gathered_keys_and_values(geometry, model, layout, row_tokens)
    return RankFootprint(
        stage=stage,
        num_layers=num_layers,
        **counted,
        largest_parameter=largest,
        gated_parameters=gated,
        layer_kept=two.kept - one.kept + (gathered if layout.recompute == "none" else 0),
        outside_kept=max(2 * one.kept - two.kept, 0),
        layers=ActivationBytes(two.kept, two.scoring_peak + gathered, two.training_peak + 2 * gathered),
        head=head,
        decoding_cache=0,
        decoding_running=0,
    )


@contextmanager
def _sampled_stage(layout: ParallelConfig, stage: int) -> Iterator[tuple[ParallelConfig, ParallelGroups]]:
    """Yields the layout without virtual stages and context ranks, and the groups of its first rank of `stage`."""
    sample = layout.model_copy(update={"virtual_pipeline": 1, "context": 1})
    rank, world = stage * layout.tensor, layout.tensor * layout.pipeline
    with fake_groups(sample, rank=rank, world=world) as groups, FakeTensorMode(allow_non_fake_inputs=True):
        yield sample, groups


def _gathered_keys_and_values(
    geometry: GeometryConfig, model: ModelConfig, layout: ParallelConfig, row_tokens: int
) -> int:
    """Returns the bytes of the other context ranks' keys and values in a layer, as received and put in order."""
    groups = max(geometry.num_query_groups // layout.tensor, 1)
    others = row_tokens - row_tokens // layout.context
    return 2 * 2 * others * groups * geometry.attention_head_dim * DTYPES[model.dtype].itemsize


def _policy(
    geometry: GeometryConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    layers_per_stage: int | None = None,
    *,
    on_cpu: bool = False,
) -> Policy | ModelChunks:
    """Builds the policy; layers_per_stage: None for as many as it has."""
    if layers_per_stage is not None:
        geometry = geometry.model_copy(update={"num_layers": layers_per_stage * groups.pipeline_size})
    return build_policy(geometry, model, groups, vocab_size=_vocab_size(geometry), seed=None, on_cpu=on_cpu)


def _vocab_size(geometry: GeometryConfig) -> int:
    assert geometry.vocab_size is not None
    return geometry.vocab_size


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _through_layers(module: GPTModel, layout: ParallelConfig, row_tokens: int) -> ActivationBytes:
    """Measures one micro-batch through the decoder of a stage, as its schedule would send it."""
    config = module.config
    rows = row_tokens // (layout.tensor if layout.sequence else 1)
    bounds = np.array([0, row_tokens])  # Only .tolist() reads them; fake tensors have no values.
    packed = PackedRow.of(bounds, row_tokens, torch.arange(row_tokens), prefixes=[(0, 0)])
    rotary = module.rotary_pos_emb(row_tokens, packed_seq=True)
    hidden = torch.empty(rows, 1, config.hidden_size, dtype=config.params_dtype)
    options: dict[str, Any] = {"attention_mask": None, "rotary_pos_emb": rotary, "packed_seq_params": packed}
    return _activation_bytes(module.decoder, hidden, lambda x: _decoder_output(module, x, options))


def _decoder_output(module: GPTModel, hidden: Tensor, options: dict[str, Any]) -> Tensor:
    if not module.pre_process:
        module.decoder.set_input_tensor(hidden)
    output = module.decoder(hidden_states=hidden, **options)
    return output[0] if isinstance(output, tuple) else output


def _through_head(module: Policy, layout: ParallelConfig, row_tokens: int) -> ActivationBytes:
    """Measures the log-probabilities of every position of a row, the largest number that there can be."""
    rows = row_tokens // (layout.tensor if layout.sequence else 1)
    hidden = torch.empty(rows, 1, module.config.hidden_size, dtype=module.config.params_dtype)
    positions = torch.empty(row_tokens, dtype=torch.int64)
    return _activation_bytes(module, hidden, lambda x: module.labelled(x, positions, positions))


def _activation_bytes(module: torch.nn.Module, hidden: Tensor, forward: Callable[[Tensor], Tensor]) -> ActivationBytes:
    """Measures one micro-batch above the parameters: scored without gradients, then forward and backward."""
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in module.parameters()]
    module.eval()
    with torch.no_grad(), StorageCounter() as scoring:
        scored = forward(hidden + 0)
        del scored
    module.train()
    with StorageCounter() as training:
        output = forward((hidden + 0).requires_grad_())
        kept = training.now
        output.sum().backward()
    for hook in hooks:
        hook.remove()
    return ActivationBytes(kept=kept, scoring_peak=scoring.peak, training_peak=training.peak)


def _drop_gradient(parameter: Tensor) -> None:
    """Drops a gradient, as Megatron-Core does once it has added the gradient to its buffer."""
    parameter.grad = None


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Largest number of bytes so far."""
        # A weak reference of Python's to a storage's wrapper may outlive the storage; these watch the storage itself.
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        """Bytes that are allocated now."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        # A view of an argument, such as a weight's transpose, allocates nothing.
        given = {
            StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in given:
                    self._alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, self.now)
        return output
