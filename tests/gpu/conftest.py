"""Fixtures of `make test-gpu`. Without a GPU all tests of the directory are skipped, with the reason.

tests/conftest.py hides GPUs from every session but `pytest -m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(
                    pytest.mark.skip(
                        reason="not run: torch sees no CUDA device, or it is hidden outside `make test-gpu`"
                    )
                )


@pytest.fixture
def devices() -> Callable[[int], None]:
    """Skips a test on a machine with fewer devices than it needs."""

    def need(count: int) -> None:
        if torch.cuda.device_count() < count:
            pytest.skip(f"not run: needs {count} devices, this machine has {torch.cuda.device_count()}")

    return need
