"""Trainer ranks in several layouts send to real workers in other processes: bit for bit, also after a worker dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.tiny_models import save_tiny

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "PP2xDP2": {"tensor": 1, "pipeline": 2},
    "TP4": {"tensor": 4, "pipeline": 1},
}


@pytest.mark.parametrize(
    ("layout", "family", "tied", "vocabulary"),
    [
        ("TP2xPP2", "qwen2", False, 121),
        pytest.param("PP2xDP2", "llama", True, 120, marks=pytest.mark.slow),
        pytest.param("TP4", "qwen3", True, 121, marks=pytest.mark.slow),
    ],
)
def test_direct_and_ipc_fill_every_server_rank(layout, family, tied, vocabulary, tmp_path):
    """Biases and padding on both sides; tied embeddings, which two stages and both replicas hold."""
    source = save_tiny(tmp_path / "model", family, tied=tied, vocabulary=vocabulary)
    assert_published(source, {"layout": LAYOUTS[layout]})


def test_key_value_heads_are_copied_to_several_server_ranks(tmp_path):
    """SGLang has such copies on a GPU; on a CPU it pads, which the configuration refuses."""
    source = save_tiny(tmp_path / "model", "qwen2", tied=False, num_groups=2, ffn=128)
    assert_published(source, {"layout": LAYOUTS["TP2xPP2"], "num_servers": 1, "server_ranks": 4})


@pytest.mark.parametrize(
    ("layout", "served"), [("TP2xPP2", "bfloat16"), pytest.param("PP2xDP2", "float32", marks=pytest.mark.slow)]
)
def test_changes_alone_fill_every_server_rank(layout, served, tmp_path):
    source = save_tiny(tmp_path / "model", "qwen2", tied=True, vocabulary=121)
    assert_published(source, {"layout": LAYOUTS[layout], "served": served, "full_every": 3})


@pytest.mark.parametrize(
    ("layout", "served"),
    [
        ("TP4", "fp8"),
        pytest.param("PP2xDP2", "fp8", marks=pytest.mark.slow),
        pytest.param("TP2xPP2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_trainer_in_fp32_publishes_other_dtypes(layout, served, tmp_path):
    """FP8 over four trainer ranks: two of them hold half a block of key rows each and must agree on its scale."""
    shape = {"hidden_size": 128, "ffn": 512, "head_dim": 64, "num_groups": 4}
    source = save_tiny(tmp_path / "model", "qwen3", tied=False, **shape)
    assert_published(source, {"layout": LAYOUTS[layout], "served": served, "bucket_bytes": 2**16})


def assert_published(source, setting):
    """Also on devices, by tests/gpu."""
    command = [sys.executable, "-m", "tests.distributed.publication_worker", str(source), json.dumps(setting)]
    outcome = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
