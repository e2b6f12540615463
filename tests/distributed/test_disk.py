"""Weights that several ranks write to disk are the model's, bit for bit, however the ranks split it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import save_tiny

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "TP2xDP2": {"tensor": 2, "pipeline": 1},
    "PP2xDP2": {"tensor": 1, "pipeline": 2},
    "TP4": {"tensor": 4, "pipeline": 1},
}


@pytest.mark.parametrize(("family", "tied", "vocabulary"), [("qwen2", False, 121), ("llama", True, 120)])
def test_disk_transport_writes_the_model_once_in_any_layout(family, tied, vocabulary, tmp_path):
    """With biases and a vocabulary that ranks pad; and with tied embeddings, which two stages hold."""
    source = save_tiny(tmp_path / "model", family, tied=tied, vocabulary=vocabulary)
    arguments = [str(source), str(tmp_path / "out"), json.dumps(LAYOUTS)]
    command = [sys.executable, "-m", "tests.distributed.disk_worker", *arguments]
    outcome = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    expected = load_file(source / "model.safetensors")
    for name in LAYOUTS:
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == ["version_000003", "version_000004"]
        directory = tmp_path / "out" / name / "version_000004"
        files = sorted(directory.glob("*.safetensors"))
        parts = [load_file(file) for file in files]
        assert len(files) == LAYOUTS[name]["pipeline"]
        assert sum(len(part) for part in parts) == len(expected)
        for tensor, values in {key: value for part in parts for key, value in part.items()}.items():
            assert torch.equal(values, expected[tensor]), f"{name}: {tensor}"
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        assert {
            t: f for file, part in zip(files, parts, strict=True) for t, f in dict.fromkeys(part, file.name).items()
        } == index
