"""State of a model in a checkpoint: Megatron-Core's sharded state, which any layout can load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

# Key under which Transformer Engine's layers keep their FP8 state: the largest values of earlier passes, and scales.
_FP8_STATE = "._extra_state"


def trained_state(prefix: str, trained: Any, *, is_loading: bool = False) -> dict[str, Any]:
    """Returns the sharded state of a models.TrainedModel under `prefix`: weights, FP8 scales, optimizer, schedule.

    FP8 weights are written in the dtype that they stand for, so that any implementation can read them.
    """
    model = trained.module.sharded_state_dict(prefix=f"{prefix}.")
    optimizer = trained.optimizer_state(model, is_loading=is_loading)
    # The optimizer's state comes first: it knows parameters by identity.
    force_all_tensors_to_non_fp8(model)
    return {
        f"{prefix}.model": model,
        f"{prefix}.optimizer": optimizer,
        f"{prefix}.schedule": trained.schedule.state_dict(),
    }


def load_trained(prefix: str, trained: Any, state: dict[str, Any]) -> None:
    """Fills the model from a loaded `trained_state`."""
    trained.module.load_state_dict(without_prefix(prefix, state[f"{prefix}.model"]))
    trained.load_optimizer_state(state[f"{prefix}.optimizer"])
    trained.schedule.load_state_dict(state[f"{prefix}.schedule"])


def weights_only(prefix: str, module: Any, *, without: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """Returns the sharded state of a module's weights, without FP8 scales and the keys that `without` selects."""
    state = module.sharded_state_dict(prefix=f"{prefix}.")
    force_all_tensors_to_non_fp8(state)
    return {key: value for key, value in state.items() if not (key.endswith(_FP8_STATE) or without(key))}


@torch.no_grad()
def load_weights_only(prefix: str, module: torch.nn.Module, state: dict[str, Any]) -> list[str]:
    """Fills a module from a loaded `weights_only`; returns the module's names that it lacks, without FP8 scales."""
    weights = without_prefix(prefix, state)
    found = module.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    for name, parameter in module.named_parameters():
        # Transformer Engine keeps the values that FP8 weights were rounded from, for the optimizer's master weights.
        # They are gone once the optimizer has taken them.
        made_of = getattr(parameter, "get_high_precision_init_val", None)
        if made_of is not None and name in weights and (value := made_of()) is not None:
            value.copy_(weights[name])
    return [name for name in found.missing_keys if not name.endswith(_FP8_STATE)]


@contextlib.contextmanager
def weights_of_checkpoint(prefix: str, module: torch.nn.Module, load: Callable[[Any], Any]) -> Iterator[None]:
    """Gives a module the weights of a checkpoint in the block, and its own, from host memory, to the bit afterwards.

    load: fills `weights_only` from the checkpoint.
    """
    own = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*module.parameters(), *module.buffers())]
    try:
        wanted = weights_only(prefix, module)
        names = list(wanted)  # loading adds the checkpoint's plain values, which are not wanted
        state = load(wanted)
        missing = load_weights_only(prefix, module, {name: state[name] for name in names})
        assert not missing, missing
        yield
    finally:
        with torch.no_grad():
            for tensor, before in own:
                tensor.copy_(before)


def without_prefix(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a module's own state dict from what was loaded under `prefix`."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
