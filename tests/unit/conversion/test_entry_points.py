"""A family of another package: found by its entry point, converted there and back, and refused where it is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny

FAMILY = """
from oreal_megatron.conversion.families.decoder import Family

FAMILY = Family(name="mine", architectures={"causal": "MineForCausalLM"}, only={"hidden_act": "silu"})
TAKEN = Family(name="other", architectures={"causal": "LlamaForCausalLM"})
NONE = "a family"
"""


@pytest.fixture
def convert(tmp_path):
    """Runs oreal-convert beside a package whose entry point names `value`; None: without the package."""

    def run(value: str | None, *arguments: object, status: int = 0) -> str:
        package = tmp_path / "packages" / "mine-1.0.dist-info"
        package.mkdir(parents=True, exist_ok=True)
        (package.parent / "mine.py").write_text(FAMILY)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text(f"[oreal_megatron.model_families]\nmine = {value}\n")
        path = {} if value is None else {"PYTHONPATH": str(package.parent)}
        outcome = subprocess.run(
            [sys.executable, "-m", "oreal_megatron.cli.convert", *map(str, arguments)],
            capture_output=True, text=True, env={**os.environ, **path},
        )  # fmt: skip
        assert outcome.returncode == status, outcome.stdout + outcome.stderr
        return outcome.stdout + outcome.stderr

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    """A small Llama under another architecture's name."""
    directory = save_tiny(tmp_path / "model", "llama", tied=False)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["MineForCausalLM"], "model_type": "mine"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_family_of_another_package_is_converted_there_and_back(convert, model, tmp_path):
    assert "MineForCausalLM is not supported" in convert(None, "to-megatron", model, tmp_path / "no", status=1)
    convert("mine:FAMILY", "to-megatron", model, tmp_path / "megatron")
    convert("mine:FAMILY", "to-hf", tmp_path / "megatron", tmp_path / "back")
    assert "bit for bit" in convert("mine:FAMILY", "compare", tmp_path / "back", tmp_path / "megatron")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["MineForCausalLM"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("mine:NOTHING", "cannot be imported: AttributeError"),
        ("mine:NONE", "is a str, no Family"),
        ("mine:TAKEN", "has the name or an architecture of the family llama. Mend or uninstall the package mine"),
    ],
)
def test_entry_points_that_are_no_family_are_refused(convert, model, tmp_path, value, problem):
    message = convert(value, "to-megatron", model, tmp_path / "megatron", status=1)
    assert problem in message and "Traceback" not in message
