"""Weights point to point between two processes over gloo; tests/gpu does the same over NCCL."""

from __future__ import annotations

import pytest

from tests.gpu.test_transports import assert_published

pytestmark = pytest.mark.distributed


def test_a_receiver_gets_its_shards_over_gloo():
    assert_published("gloo", "bfloat16")
