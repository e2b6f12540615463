"""Fixtures of all tests: the CPU backend, the groups of one process, and tiny configurations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from oreal_megatron.distributed.environment import NO_DEVICES
from tests.skips import UnexpectedSkips
from tests.tiny import TINY, command_line

ROOT = Path(__file__).resolve().parent.parent

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":  # `make test-gpu`
        os.environ.update(NO_DEVICES)
    if os.environ.get("OREAL_CI") == "1":
        config.pluginmanager.register(UnexpectedSkips())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the unit tests that start neither commands nor several processes, which `make test-fast` runs, as fast."""
    for item in items:
        is_long = any(item.get_closest_marker(name) for name in ("end_to_end", "distributed"))
        if ROOT / "tests" / "unit" in item.path.parents and not is_long:
            item.add_marker("fast")


def compose(*overrides: str) -> dict[str, Any]:
    """conf/ composed with `overrides`, as plain data."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra_compose("config", overrides=["run.name=test", *overrides], return_hydra_config=False)
    container = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(container, dict)
    container.pop("cluster")  # the site's part, which is no part of a run
    return container  # type: ignore[return-value]


@pytest.fixture(scope="session")
def composed() -> Any:
    return compose


@pytest.fixture(scope="session")
def single_process() -> Iterator[Any]:
    """ParallelGroups of one process, inside the CPU backend."""
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.distributed.cpu_backend import cpu_backend
    from oreal_megatron.distributed.groups import parallel_groups

    config = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=512)
    with cpu_backend(), parallel_groups(config, seed=0) as groups:
        yield groups


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one finished tiny run."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    outcome = command_line(
        *TINY, f"run.dir={directory}", "tracking.profile=[1,1]", "tracking.timeline=[1,2]", new_interpreter=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return directory


@pytest.fixture
def warm(finished: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A new run directory that already holds the finished run's initial policy, so that no warm start is needed."""

    def make(name: str = "run") -> Path:
        directory = tmp_path / name
        shutil.copytree(finished / "checkpoints" / "initial", directory / "checkpoints" / "initial")
        return directory

    return make
