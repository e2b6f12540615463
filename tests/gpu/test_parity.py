"""The parity suite on devices, over NCCL: every layout gives one device's losses, gradients and updated weights."""

from __future__ import annotations

import pytest

from tests.parity.layouts import covering_cases
from tests.parity.test_parity import beyond_tolerance
from tests.parity.test_parity import compare as compare


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_give_the_numbers_of_one_device(devices, compare, world):
    devices(world)
    results = compare(covering_cases(world), "spawn")
    assert len(results) >= 15 and not beyond_tolerance(results)
