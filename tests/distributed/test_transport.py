"""Weights point to point over gloo, and through shared memory; tests/gpu does the same on devices."""

from __future__ import annotations

import pytest

from tests.gpu.test_transports import assert_published, publish_by_ipc

pytestmark = pytest.mark.distributed


def test_receiver_gets_its_shards_over_gloo():
    assert_published("gloo", "bfloat16")


def test_server_on_the_trainers_machine_reads_by_ipc(tmp_path):
    publish_by_ipc(tmp_path, 1, "fp8", device="cpu")
