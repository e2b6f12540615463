"""Saving a run: a checkpoint that is still being written is completed, not written again."""

from __future__ import annotations

import time
from types import SimpleNamespace

from oreal_megatron.checkpoint.store import Best, CheckpointStore, step_name
from oreal_megatron.run_state import RunProgress, save
from tests.unit.checkpoint.test_store import state, writing

__all__ = ["writing"]  # a fixture


def test_save_waits_for_a_checkpoint_that_is_being_written(tmp_path, single_process, writing):
    """A stop arrives while the last step's checkpoint is still being written."""
    store = CheckpointStore(tmp_path / "checkpoints", single_process, keep=2)
    writing(lambda: time.sleep(1.0))
    best = Best(step=2, score=0.5)
    store.save(step_name(2), state(1.0), best=best, wait=False)
    assert not store.has(step_name(2))
    run = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(mode="train")),
        progress=RunProgress(step=2, best=best),
        store=store,
    )
    save(run, wait=True)  # nothing else of a run is needed: the step has its checkpoint
    assert store.steps == [2] and store.newest_whole() == 2
    assert not list(store.directory.glob("*.partial-*"))
