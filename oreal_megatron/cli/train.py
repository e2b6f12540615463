"""Console entry points: Hydra composes, the schema validates, `build` wires, `train` runs."""

from __future__ import annotations

import logging
import os
import sys

import hydra
from omegaconf import DictConfig

from oreal_megatron.compose import config_directory, validated
from oreal_megatron.config import ConfigError, TrainConfig
from oreal_megatron.dry_run import is_dry_run, shrunk
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
    """Makes the initial policy, builds the run, estimates pass rates, trains, and writes the report."""
    from oreal_megatron.builder import build_run
    from oreal_megatron.initial_policy import make_initial_policy
    from oreal_megatron.pass_rates import prepare
    from oreal_megatron.report import write_report
    from oreal_megatron.train import train
    from oreal_megatron.workspace import opened_workspace

    stop = StopRequest()
    with stop.on_signals(), opened_workspace(config, stop) as workspace:
        make_initial_policy(workspace)
        run = build_run(workspace)
        prepare(run)
        train(run)
        if config.tracking.report and run.groups.is_main:
            logger.info("report: %s", write_report(run.directory))


def train() -> None:
    """`oreal-train`: one OREAL run."""
    _train()


if __name__ == "__main__":
    train()
