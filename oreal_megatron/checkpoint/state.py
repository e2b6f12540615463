"""What of a model goes into a checkpoint, as Megatron-Core's sharded state: loadable on any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

# Transformer Engine's layers keep here what FP8 has learnt: the largest values of earlier passes, and scales.
_FP8_STATE = "._extra_state"


def trained_state(prefix: str, trained: Any, *, is_loading: bool = False) -> dict[str, Any]:
    """The sharded state of a models.TrainedModel under `prefix`: weights, FP8 scales, optimizer, schedule.

    Weights that live in FP8 are written in the dtype that they stand for, so that any implementation can read them.
    """
    model = trained.module.sharded_state_dict(prefix=f"{prefix}.")
    optimizer = trained.optimizer_state(model, is_loading=is_loading)
    # After the optimizer's, which knows parameters by identity.
    force_all_tensors_to_non_fp8(model)
    return {
        f"{prefix}.model": model,
        f"{prefix}.optimizer": optimizer,
        f"{prefix}.schedule": trained.schedule.state_dict(),
    }


def load_trained(prefix: str, trained: Any, state: dict[str, Any]) -> None:
    """The inverse of `trained_state`."""
    trained.module.load_state_dict(without_prefix(prefix, state[f"{prefix}.model"]))
    trained.load_optimizer_state(state[f"{prefix}.optimizer"])
    trained.schedule.load_state_dict(state[f"{prefix}.schedule"])


def weights_only(prefix: str, module: Any, *, without: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """The sharded state of a module's weights, keys that `without` names left out; FP8 scales are no weights."""
    state = module.sharded_state_dict(prefix=f"{prefix}.")
    force_all_tensors_to_non_fp8(state)
    return {key: value for key, value in state.items() if not (key.endswith(_FP8_STATE) or without(key))}


@torch.no_grad()
def load_weights_only(prefix: str, module: torch.nn.Module, state: dict[str, Any]) -> list[str]:
    """Fills a module from what was loaded for `weights_only`; the module's names that it left out, FP8 scales aside."""
    weights = without_prefix(prefix, state)
    found = module.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    for name, parameter in module.named_parameters():
        # Of weights in FP8, Transformer Engine keeps the values they were made of, for the optimizer's master weights.
        if (made_of := getattr(parameter, "get_high_precision_init_val", None)) is not None and name in weights:
            made_of().copy_(weights[name])
    return [name for name in found.missing_keys if not name.endswith(_FP8_STATE)]


def without_prefix(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """A module's own state dict from what was loaded under `prefix`."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
