"""Console entry points: Hydra composes, the schema validates, `build` wires, `train` runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from oreal_megatron.compose import config_directory, validated
from oreal_megatron.config import ConfigError, TrainConfig, check_resume
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.files import write_atomically
from oreal_megatron.log import quiet_libraries
from oreal_megatron.stopping import EXIT_STOPPED, LostPeer, Stopped, StopRequest

logger = logging.getLogger("oreal_megatron.cli.train")  # also where this module is run as __main__


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def _train(composed: DictConfig) -> None:
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        # A sweep's job (conf/hydra/launcher/slurm.yaml): its processes learn their ranks here.
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    try:
        config = validated(shrunk(composed) if is_dry_run(composed) else composed)
        quiet_libraries()
        run_training(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except ConfigError as error:
        # Every rank has the same configuration: one of them says what is wrong with it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except LostPeer as lost:
        print(lost, file=sys.stderr)
        sys.exit(1)
    except (ValueError, ArithmeticError, OSError) as error:
        if os.environ.get("OREAL_TRACEBACK") == "1":
            raise
        print(f"error: {error}\n(OREAL_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)


def run_training(config: TrainConfig) -> None:
    """Saves the resolved configuration with the run, trains, and reports."""
    from oreal_megatron.builder import opened_run
    from oreal_megatron.report import write_report
    from oreal_megatron.train import train

    directory = Path(config.run.dir)
    saved = directory / "config.yaml"
    if saved.is_file():
        check_resume(yaml.safe_load(saved.read_text()), config, str(directory))
    stop = StopRequest()
    with stop.on_signals(), opened_run(config, stop) as run:
        if run.groups.is_main:
            write_atomically(saved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        train(run)
        if config.tracking.report and run.groups.is_main:
            logger.info("report: %s", write_report(directory))


def train() -> None:
    """`oreal-train`: one OREAL run."""
    _train()


if __name__ == "__main__":
    train()
