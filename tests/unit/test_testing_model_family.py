"""check_model_family: the package's families pass, and planted faults are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oreal_megatron.conversion import huggingface
from oreal_megatron.conversion.families import qwen3
from oreal_megatron.testing import check_model_family
from tests.tiny_models import save_tiny


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_passes(single_process, tmp_path, family):
    # Mistral has a sliding window unless it is switched off, which the package refuses.
    more = {"sliding_window": None} if family == "mistral" else {}
    model = save_tiny(tmp_path / "model", family, tied=family == "llama", **more)
    check_model_family(model, tmp_path / "work", groups=single_process)


def test_a_family_that_loses_tensors_is_found(single_process, tmp_path, monkeypatch):
    """Qwen3 without its rules for the norms of queries and keys."""
    model = save_tiny(tmp_path / "model", "qwen3", tied=False)
    broken = replace(qwen3.FAMILY, extra_layer_rules=())
    monkeypatch.setattr(huggingface, "all_families", lambda: (broken,))
    with pytest.raises((AssertionError, ValueError), match=r"layernorm|norm\.weight"):
        check_model_family(model, tmp_path / "work", groups=single_process)


def test_a_decoder_that_computes_something_else_is_found(single_process, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", "llama", tied=False)
    geometry = huggingface.geometry_of(model)
    other = geometry.model_copy(update={"norm_eps": 0.1})
    monkeypatch.setattr("oreal_megatron.testing.model_family.geometry_of", lambda path: other)
    with pytest.raises(AssertionError, match=r"log-probabilities differ from those of transformers by .* nats"):
        check_model_family(model, tmp_path / "work", groups=single_process)
