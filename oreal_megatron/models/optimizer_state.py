"""AdamW's state by parameter of the model: one checkpoint format for all layouts and all of Megatron-Core's optimizers.

Megatron-Core has three formats of sharded optimizer states that do not load into each other. Two of them are also wrong
in 0.16.1:

- The distributed optimizer's reads parameters from wrong places, with a warning only, when gradients are in several
  buckets (overlapped reduction of a large model, tied embeddings over stages). It does not load into torch's AdamW.
- The format of bf16 weights confuses the states of parameters that are fp32 themselves.

This module uses the optimizers' own maps from parameters to the pieces that a rank holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

_WEIGHT = "fp32_param"
"""Name of the fp32 weights, which are part of the state of parameters that are not fp32 themselves."""


@dataclass(frozen=True)
class _Piece:
    """The part of a parameter that this rank's AdamW has: all of it, or a range under the distributed optimizer."""

    weight: Tensor
    """The fp32 weight that AdamW updates."""
    state: dict[str, Tensor]
    """AdamW's state by name, such as exp_avg."""
    start: int
    """Index of the first element in the flattened parameter."""

    def tensor(self, name: str) -> Tensor:
        """Returns the fp32 weight or a tensor of AdamW's state."""
        return self.weight if name == _WEIGHT else self.state[name]


def sharded_optimizer_state(parts: Iterable[Any], model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Returns the state of Megatron-Core's optimizers as tensors that are sharded like the parameters.

    Every rank calls it.

    Args:
        parts: optimizers, each of which wraps an optimizer of torch or Transformer Engine.
        model: sharded state of the model.
        is_loading: whether the tensors are allocated to be filled, without the present state.
    """
    parameters, _ = extract_sharded_tensors_and_factories(model)
    sharded = {id(item.data): item for item in nested_values(parameters)}
    tensors = []
    steps = []
    for part in parts:
        steps += _steps(part)
        for parameter, whole in _empty(part) if is_loading else _whole(part):
            tensors.append({name: _like(sharded[id(parameter)], name, tensor) for name, tensor in whole.items()})
    assert len(set(steps)) <= 1, f"parameters of one model have made {sorted(set(steps))} updates"
    return {"tensors": tensors, "step": steps[0] if steps else 0}


def load_optimizer_state(parts: Iterable[Any], state: dict[str, Any]) -> None:
    """Copies this rank's pieces from the loaded values of `sharded_optimizer_state` into the optimizers."""
    loaded = iter(state["tensors"])
    for part in parts:
        pieces = _pieces(part)
        for parameter in _parameters(part):
            whole = next(loaded)
            if parameter not in pieces:
                continue
            piece = pieces[parameter]
            for name, tensor in whole.items():
                into = piece.tensor(name)
                mine = tensor.flatten()[piece.start : piece.start + into.numel()]
                into.data.copy_(mine.view(into.shape))
        _set_step(part, state["step"])


def _pieces(part: Any) -> dict[Tensor, _Piece]:
    """Returns this rank's pieces by parameter of the model."""
    if isinstance(part, DistributedOptimizer):
        of_model: tuple[Any, ...] = (part.model_float16_groups, part.model_fp32_groups)
        of_adamw: tuple[Any, ...] = (part.shard_fp32_from_float16_groups, part.shard_fp32_groups)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        of_model = (part.float16_groups, part.fp32_from_fp32_groups)
        of_adamw = (part.fp32_from_float16_groups, part.fp32_from_fp32_groups)
    else:
        of_model = of_adamw = ([group["params"] for group in part.optimizer.param_groups],)
    flat = itertools.chain.from_iterable
    return {
        parameter: _Piece(weight, part.optimizer.state[weight], _range(part, parameter, "param").start)
        for parameter, weight in zip(flat(flat(of_model)), flat(flat(of_adamw)), strict=True)
    }


def _range(part: Any, parameter: Tensor, where: str) -> slice:
    """Returns the range of this rank's piece: in the parameter ("param") or in the bucket's shard ("gbuf_local")."""
    if not isinstance(part, DistributedOptimizer):
        return slice(0, parameter.numel())
    found = part._get_model_param_range_map(parameter)[where]
    return slice(found.start, found.end)


def _parameters(part: Any) -> list[Tensor]:
    """Returns all parameters that the optimizer updates on any data-parallel rank, in the same order on all of them."""
    if isinstance(part, DistributedOptimizer):
        return [p for buffer in part.buffers for bucket in buffer.buckets for p in bucket.params_list]
    return list(_pieces(part))


def _names(parameter: Tensor) -> tuple[str, ...]:
    moments = ("exp_avg", "exp_avg_sq")
    return moments if parameter.dtype == torch.float32 else (*moments, _WEIGHT)


def _empty(part: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for parameter in _parameters(part):
        yield parameter, {name: torch.empty(parameter.shape) for name in _names(parameter)}


def _whole(part: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields every parameter with its whole state; the distributed optimizer's is gathered by bucket, on the host."""
    pieces = _pieces(part)
    if not isinstance(part, DistributedOptimizer):
        for parameter, piece in pieces.items():
            yield parameter, {name: piece.tensor(name).detach() for name in _names(parameter)}
        return
    group = part.data_parallel_group
    for buffer in part.buffers:
        for bucket in buffer.buckets:
            size, names = bucket.grad_data.numel(), _names(bucket.params_list[0])
            gathered = {}
            for name in names:
                local = torch.zeros(size // group.size(), device=bucket.grad_data.device)
                for parameter in bucket.params_list:
                    if parameter in pieces:
                        local[_range(part, parameter, "gbuf_local")] = pieces[parameter].tensor(name)
                shards = [torch.empty_like(local) for _ in range(group.size())]
                dist.all_gather(shards, local, group=group)
                gathered[name] = torch.cat([shard.cpu() for shard in shards])
            for parameter in bucket.params_list:
                start, end, _ = buffer.param_index_map[parameter]
                inside = slice(start - bucket.offset, end - bucket.offset)
                yield parameter, {name: flat[inside].view(parameter.shape) for name, flat in gathered.items()}


def _like(sharded: Any, name: str, tensor: Tensor) -> Any:
    """Returns `tensor` sharded like its parameter."""
    key = f"optimizer.state.{name}.{sharded.key}"
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, key=key, data=tensor)
    return replace(sharded, key=key, data=tensor, dtype=tensor.dtype)


def _steps(part: Any) -> list[int]:
    """Returns the counts of updates: torch's AdamW has one a parameter, fused optimizers one a group."""
    if isinstance(part.optimizer, torch.optim.AdamW):
        return [int(state["step"]) for state in part.optimizer.state.values()]
    return [int(group.get("step", 0)) for group in part.optimizer.param_groups if group["params"]]


def _set_step(part: Any, step: int) -> None:
    if isinstance(part.optimizer, torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state["step"].fill_(float(step))
    elif step:
        for group in part.optimizer.param_groups:
            group["step"] = step
