"""What of a model goes into a checkpoint, as Megatron-Core's sharded state: loadable on any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def trained_state(prefix: str, trained: Any, *, is_loading: bool = False) -> dict[str, Any]:
    """The sharded state of a models.TrainedModel under `prefix`: weights, optimizer, schedule."""
    model = trained.module.sharded_state_dict(prefix=f"{prefix}.")
    return {
        f"{prefix}.model": model,
        f"{prefix}.optimizer": trained.optimizer_state(model, is_loading=is_loading),
        f"{prefix}.schedule": trained.schedule.state_dict(),
    }


def load_trained(prefix: str, trained: Any, state: dict[str, Any]) -> None:
    """The inverse of `trained_state`."""
    trained.module.load_state_dict(without_prefix(prefix, state[f"{prefix}.model"]))
    trained.load_optimizer_state(state[f"{prefix}.optimizer"])
    trained.schedule.load_state_dict(state[f"{prefix}.schedule"])


def weights_only(prefix: str, module: Any, *, without: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """The sharded state of a module's weights, keys that `without` names left out."""
    state = module.sharded_state_dict(prefix=f"{prefix}.")
    return {key: value for key, value in state.items() if not without(key)}


def without_prefix(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """A module's own state dict from what was loaded for `weights_only`."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
