"""Conversion against real Megatron-Core models of several ranks: slices, logits, its loader and its writer."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oreal_megatron.config import ParallelConfig
from oreal_megatron.conversion.convert import to_huggingface, to_megatron
from oreal_megatron.conversion.huggingface import read_model
from oreal_megatron.conversion.layout import Layout
from tests.conftest import ROOT
from tests.tiny_models import FAMILIES, LOGPROB_ROUNDING, save_tiny
from tests.unit.conversion.test_round_trip import assert_same_bits

pytestmark = pytest.mark.distributed

EVERY_CASE = tuple(itertools.product(FAMILIES, (True, False), ("causal",))) + tuple(
    (family, False, "scalar") for family in FAMILIES
)
SOME_CASES = (
    ("llama", True, "causal"),
    ("qwen2", False, "causal"),
    ("qwen3", True, "causal"),
    ("qwen2", False, "scalar"),
)
# The checkpoint is cut for another layout than the one that loads it.
CUT = Layout(tensor=2, pipeline=2, vocabulary_multiple=16)


def check(directory: Path, cases: Any, tensor: int, pipeline: int, virtual: int) -> None:
    world = tensor * pipeline
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, micro_batch_tokens=64)
    for family, tied, head in cases:
        case = directory / f"{family}-{'tied' if tied else 'untied'}-{head}"
        # 121 rows need padding at every tensor split.
        save_tiny(case / "hf", family, tied=tied, head=head, num_layers=4, vocabulary=121)
        to_megatron(case / "hf", case / "megatron", CUT)
        torch.save(expected_logits(case / "hf", head, num_rows=world), case / "logits.pt")
    (directory / "layout.json").write_text(layout.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    outcome = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distributed.conversion_worker", str(directory)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert outcome.returncode == 0, outcome.stderr[-5000:]
    results = json.loads((directory / "results.json").read_text())
    assert len(results) == len(cases)
    for name, result in results.items():
        print(name, tensor, pipeline, virtual, result)
        assert result["logits"] < LOGPROB_ROUNDING, (name, result)
        assert result["parameters"] > 10 and result["differing_parameters"] == 0, (name, result)
        # What Megatron-Core wrote from this layout becomes the directory that it was loaded from.
        head = read_model(directory / name / "hf").head
        to_huggingface(
            directory / name / "saved",
            directory / name / "back",
            prefix="policy.",
            head=head,
            assets=directory / name / "hf",
        )
        assert_same_bits(directory / name / "hf", directory / name / "back")


def expected_logits(path: Path, head: str, num_rows: int) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    kind = AutoModelForCausalLM if head == "causal" else AutoModelForTokenClassification
    ids = torch.randint(0, 121, (num_rows, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {"ids": ids, "logits": kind.from_pretrained(path).eval()(ids).logits.float()}


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual"), [(2, 1, 1), (1, 2, 1), (1, 2, 2)], ids=["tp2", "pp2", "pp2vpp2"]
)
def test_two_ranks_hold_what_transformers_holds(tmp_path, tensor, pipeline, virtual):
    check(tmp_path, SOME_CASES, tensor, pipeline, virtual)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)],
    ids=["tp1", "tp2", "tp4", "pp2", "pp2vpp2", "tp2pp2", "tp2pp2vpp2"],
)
def test_every_family_in_every_layout(tmp_path, tensor, pipeline, virtual):
    check(tmp_path, EVERY_CASE, tensor, pipeline, virtual)
