"""The store on one process: what is whole, what is kept, what a kill, a disk or a hand leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from oreal_megatron.checkpoint.store import INITIAL, Best, CheckpointStore, is_better, step_name


def state(value: float = 0.0, size: int = 1000) -> dict:
    """A sharded state of one fp32 tensor [size], and a plain value."""
    return {
        "weights": ShardedTensor.from_rank_offsets("weights", torch.full((size,), value)),
        "plain": {"value": value},
    }


@pytest.fixture
def store(tmp_path, single_process):
    return new_store(tmp_path, single_process)


def new_store(tmp_path: Path, groups, keep: int = 2, **more) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", groups, keep=keep, **more)


def names(store: CheckpointStore) -> set[str]:
    return {path.name for path in store.directory.iterdir()}


@pytest.mark.parametrize("wait", [True, False])
def test_a_checkpoint_is_the_state_when_it_was_saved(store, tmp_path, single_process, wait):
    saved = state(1.0)
    store.save(step_name(3), saved, wait=wait)
    saved["weights"].data.fill_(7.0)  # what the next step does while the checkpoint is written
    store.finish(wait=True)
    again = new_store(tmp_path, single_process)
    assert again.newest_whole() == 3
    loaded = again.load(step_name(3), state())
    assert loaded["plain"] == {"value": 1.0}
    assert loaded["weights"].tolist() == [1.0] * 1000


def test_an_unfinished_save_is_nothing_until_it_is_whole(store):
    store.save(step_name(1), state())
    store.save(step_name(2), state(), wait=False)
    assert store.steps == [1]
    store.save(step_name(3), state(), wait=True)  # waits for the one before
    assert store.steps == [2, 3] and store.newest_whole() == 3


def test_retention_keeps_the_newest_and_the_best_as_of_each_of_them(store):
    store.save(INITIAL, state())
    bests = {1: Best(step=1, score=0.5), 2: Best(step=1, score=0.5), 3: Best(step=3, score=0.7)}
    for step in range(1, 7):
        store.save(step_name(step), state(), best=bests.get(step, Best(step=3, score=0.7)))
        if step == 3:
            # Were step 3 found damaged, step 2 would go on, and its best is step 1.
            assert names(store) >= {INITIAL, step_name(1), step_name(2), step_name(3)}
    assert names(store) == {INITIAL, step_name(3), step_name(5), step_name(6), "best.json"}
    assert '"checkpoint": "step_000003"' in (store.directory / "best.json").read_text()


def test_best_after_no_steps_is_the_initial_policy(store):
    store.save(INITIAL, state())
    store.remember_best(Best(step=0, score=0.1))
    assert '"checkpoint": "initial"' in (store.directory / "best.json").read_text()
    store.remember_best(None)
    assert not (store.directory / "best.json").exists()


def test_a_score_is_better_only_if_it_is_higher_and_a_number():
    assert is_better(0.1, None) and is_better(0.2, Best(step=1, score=0.1))
    assert not is_better(0.1, Best(step=1, score=0.1))
    assert not is_better(float("nan"), None) and not is_better(float("nan"), Best(step=1, score=0.1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("__0_0.distcp", truncate, r"__0_0.distcp has \d+ bytes, \d+ were written"),
        ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
        ("__0_0.distcp", flip, "__0_0.distcp does not hold the bytes that were written"),
        ("metadata.json", truncate, "metadata.json has"),
        (".metadata", flip, ".metadata does not hold"),
        ("manifest.json", truncate, "manifest.json is missing or cannot be read"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    store, tmp_path, single_process, name, harm, message, caplog
):
    store.save(step_name(1), state(1.0), best=Best(step=1, score=0.5))
    store.save(step_name(2), state(2.0), best=Best(step=2, score=0.6))
    harm(store.directory / step_name(2) / name)
    again = new_store(tmp_path, single_process)
    with pytest.raises(ValueError, match=f"step_000002 is damaged: {message}"):
        again.load(step_name(2), state())
    assert again.newest_whole() == 1
    assert again.load(step_name(1), state())["plain"] == {"value": 1.0}
    (line,) = [message for message in caplog.messages if message.startswith("checkpoint")]
    assert "checkpoint step_000002 is damaged" in line and "set aside as step_000002.damaged" in line
    again.save(step_name(2), state(2.0))  # the run comes by again
    assert again.steps == [1, 2] and step_name(2) + ".damaged" not in names(again)


def test_damage_to_all_checkpoints_is_an_error_that_says_what_to_do(store, tmp_path, single_process):
    store.save(step_name(1), state())
    truncate(store.directory / step_name(1) / ".metadata")
    with pytest.raises(ValueError, match=r"step_000001 is damaged .* none before it; restore it .*, or remove it"):
        new_store(tmp_path, single_process).newest_whole()


def test_what_killed_saves_and_removals_leave_is_cleared_and_named(store, tmp_path, single_process, caplog):
    store.save(step_name(1), state())
    (store.directory / "step_000002.partial-0123abcd").mkdir()
    (store.directory / "step_000002.partial-0123abcd" / ".metadata").write_text("half")
    (store.directory / "step_000000.removed").mkdir()
    again = new_store(tmp_path, single_process)
    assert names(again) == {step_name(1)}
    (line,) = [message for message in caplog.messages if message.startswith("checkpoint")]
    assert "step_000002.partial-0123abcd was never finished: removed" in line
    assert again.newest_whole() == 1


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.05])
def test_process_killed_while_saving_leaves_whole_checkpoints(store, tmp_path, single_process, delay):
    """In a forked process: a large save, killed in the middle, its writer left alone."""
    store.save(step_name(1), state(1.0))
    large = state(2.0, 10_000_000)  # filled before the fork: a child has none of the threads that torch fills with
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        store.save(step_name(2), large)
        os._exit(0)
    os.read(reader, 1)
    signal.sigtimedwait([], delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again = new_store(tmp_path, single_process)
    step = again.newest_whole()
    sizes = {1: 1000, 2: 10_000_000}
    assert (again.load(step_name(step), state(size=sizes[step]))["weights"] == float(step)).all()


@pytest.fixture
def writing(monkeypatch):
    """Makes the process that writes call a function first."""

    def first(function):
        write = FileSystemWriterAsync.write_preloaded_data

        def function_then_write(*args, **options):
            function()
            write(*args, **options)

        monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(function_then_write))

    return first


@pytest.mark.timeout(120)
def test_a_writer_needs_none_of_the_threads_that_it_was_forked_from(store, writing):
    """A forked process has no OpenMP threads but waits for them, in whatever torch splits over several."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = torch.arange(4_000_000, dtype=torch.float32)
        views = {"whole": whole, "part": whole[1000:3_000_000], "columns": whole.view(2000, 2000)[:, :1500]}
        saved = {name: ShardedTensor.from_rank_offsets(name, view) for name, view in views.items()}
        writing(lambda: torch.full((10_000_000,), 1.0).add_(1.0).clone())
        store.save(step_name(1), saved, wait=False)
        expected = {name: view.clone() for name, view in views.items()}
        whole.add_(1.0)  # the next step
        store.finish(wait=True)
    finally:
        torch.set_num_threads(before)
    empty = {n: ShardedTensor.from_rank_offsets(n, torch.zeros(view.shape)) for n, view in expected.items()}
    loaded = store.load(step_name(1), empty)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_killed_writer_is_an_error_and_what_was_whole_stays(store, writing):
    store.save(step_name(1), state())
    writing(lambda: os.kill(os.getpid(), signal.SIGKILL))
    store.save(step_name(2), state(), wait=False)
    with pytest.raises(OSError, match=r"checkpoint step_000002 cannot be .* the process that writes it was killed"):
        store.finish(wait=True)
    assert store.newest_whole() == 1 and names(store) == {step_name(1)}


def test_a_checkpoint_of_another_model_is_refused_by_name(store):
    store.save(step_name(1), state())
    with pytest.raises(ValueError, match=r"step_000001 does not fit this run's model"):
        store.load(step_name(1), state(size=999))


def test_on_saved_gets_the_oldest_of_the_newest_steps(tmp_path, single_process):
    oldest_steps: list[int] = []
    store = new_store(tmp_path, single_process, on_saved=oldest_steps.append)
    for step in (2, 4, 6):
        store.save(step_name(step), state(), best=Best(step=2, score=1.0))
    assert oldest_steps == [2, 2, 4]


def test_checkpoint_whose_evaluation_is_under_way_stays_as_long_as_one_that_says_so(tmp_path, single_process):
    oldest_steps: list[int] = []
    store = new_store(tmp_path, single_process, on_saved=oldest_steps.append)
    for step in range(1, 7):
        store.save(step_name(step), state(), pending_evaluation=2 if 2 <= step <= 4 else None)
        if 2 <= step <= 5:
            assert step_name(2) in names(store)
    assert names(store) == {step_name(5), step_name(6)}
    assert oldest_steps == [1, 1, 2, 2, 2, 5]  # the journal of the evaluation is kept as long
