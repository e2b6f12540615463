"""A run's directory takes one configuration, whichever of its records of that are left."""

from __future__ import annotations

import pytest

from oreal_megatron.checkpoint.manifest import write_manifest
from oreal_megatron.config import ConfigError, parse_config, settings_of
from oreal_megatron.workspace import claim_directory


@pytest.mark.parametrize("left", ["config.yaml", "journal/config.yaml", "checkpoints/step_000002/manifest.json"])
def test_each_record_of_the_configuration_refuses_another_run(composed, tmp_path, single_process, left):
    config, other = parse_config(composed()), parse_config(composed("objective.beta=0.5", "run.num_steps=7"))
    claim_directory(tmp_path, config, single_process)
    checkpoint = tmp_path / "checkpoints/step_000002"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {}, made_from=settings_of(config))
    for name in {"config.yaml", "journal/config.yaml", "checkpoints/step_000002/manifest.json"} - {left}:
        (tmp_path / name).unlink()
    place = tmp_path / left if left.endswith("yaml") else checkpoint
    with pytest.raises(ConfigError, match=f"objective.beta = 0.5: {place} was made with") as refused:
        claim_directory(tmp_path, other, single_process)
    assert len(refused.value.violations) == 1
    claim_directory(tmp_path, config, single_process)
    assert (tmp_path / "config.yaml").is_file()
