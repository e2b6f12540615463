"""Contexts that remember what they were entered with."""

import contextlib


class FP8GlobalStateManager:
    recipe = None
    """Of the innermost autocast."""
    parameters = False
    """Whether weights are made in FP8."""

    @classmethod
    def is_fp8_enabled(cls):
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, fp8_recipe=None, fp8_group=None):
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextlib.contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    FP8GlobalStateManager.parameters = enabled
    try:
        yield
    finally:
        FP8GlobalStateManager.parameters = False
