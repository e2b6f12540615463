"""The initial policy's checkpoint is refused where the files that it was made from have changed."""

from __future__ import annotations

import json

import pytest

from oreal_megatron.checkpoint import manifest
from oreal_megatron.config import ConfigError, parse_config
from oreal_megatron.initial_policy import _check_made_from, initial_settings, weights_fingerprint
from tests.tiny_models import save_tiny


@pytest.fixture
def made(composed, tmp_path):
    """Settings of a run with model.path and demonstrations, and the checkpoint that names them."""
    model = save_tiny(tmp_path / "model", "qwen2", tied=False)
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(json.dumps({"question": "1+1", "response": "2"}) + "\n")
    config = parse_config(
        composed(
            "model=huggingface",
            f"model.path={model}",
            "model.tokenizer=arithmetic",
            "model.max_sequence_length=128",
            f"sft.demonstrations={demonstrations}",
        )
    )
    checkpoint = tmp_path / "initial"
    checkpoint.mkdir()
    manifest.write_manifest(checkpoint, {}, made_from=initial_settings(config))
    return config, checkpoint, model, demonstrations


def test_unchanged_files_are_accepted(made):
    config, checkpoint, *_ = made
    _check_made_from(checkpoint, initial_settings(config))


def test_changed_demonstrations_name_the_file(made):
    config, checkpoint, _, demonstrations = made
    demonstrations.write_text(json.dumps({"question": "1+1", "response": "3"}) + "\n")
    with pytest.raises(ConfigError, match=r"sft\.demonstrations = .*: Its content has changed") as error:
        _check_made_from(checkpoint, initial_settings(config))
    assert "Restore it" in str(error.value) and "(content)" not in str(error.value)
    demonstrations.unlink()  # not needed any more
    _check_made_from(checkpoint, initial_settings(config))


def test_other_weights_in_the_same_place_name_the_directory(made):
    config, checkpoint, model, _ = made
    before = weights_fingerprint(model)
    save_tiny(model, "qwen2", tied=False, seed=1)
    assert weights_fingerprint(model) != before
    with pytest.raises(ConfigError, match=r"model\.path = .*: Its content has changed"):
        _check_made_from(checkpoint, initial_settings(config))


def test_checkpoint_without_digests_is_accepted(made):
    config, checkpoint, *_ = made
    settings = initial_settings(config)
    manifest.write_manifest(
        checkpoint, {}, made_from={k: v for k, v in settings.items() if not k.endswith("(content)")}
    )
    _check_made_from(checkpoint, settings)
