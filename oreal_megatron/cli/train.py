"""`oreal-train`: Hydra composes the configuration, the schema validates it, the builder builds, `train` trains."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from oreal_megatron.cli.arguments import VERSION
from oreal_megatron.cli.errors import ending_on_errors, run_command
from oreal_megatron.compose import validated
from oreal_megatron.config import TrainConfig
from oreal_megatron.distributed.environment import NCCL_WITHOUT_CUMEM, devices_hidden
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.log import quiet_libraries
from oreal_megatron.overrides import (
    check_overrides,
    composition_error,
    config_directory,
    search_path,
)
from oreal_megatron.stopping import StopRequest

logger = logging.getLogger("oreal_megatron.cli.train")  # the same name where this module runs as __main__


def main() -> NoReturn:
    """Runs `oreal-train`: one OREAL run, or a sweep of runs."""
    if "--version" in sys.argv[1:]:  # Hydra's flag shows Hydra's version
        print(VERSION)
        sys.exit()
    run_command(_compose_and_train, continues=True)


def _compose_and_train() -> None:
    # Hydra then raises its errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault(*NCCL_WITHOUT_CUMEM)  # before torch is imported
    arguments = get_args_parser().parse_args()
    config_dir = None if arguments.config_dir is None else Path(arguments.config_dir)
    if config_dir is not None:
        search_path(config_dir)
    if not arguments.shell_completion:  # its arguments, such as install=bash, are no overrides
        check_overrides(arguments.overrides, config_dir)
    _composed.clear()
    try:
        _train()
    except Exception as error:
        if _composed:
            raise
        raise composition_error(error, arguments.overrides, config_dir) from error


_composed: list[DictConfig] = []
"""The configuration, once Hydra has composed it: an error after that is the run's, not the command line's."""


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def _train(composed: DictConfig) -> None:
    _composed.append(composed)
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        # A sweep's job (conf/hydra/launcher/slurm.yaml): its processes get their ranks here.
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    # Ends the process here, because Hydra adds lines of its own to an error that passes through it.
    with ending_on_errors(continues=True):
        config = validated(shrunk(composed) if is_dry_run(composed) else composed)
        quiet_libraries()
        with devices_hidden(when=config.resources.device == "cpu"):
            run_training(config)


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


if __name__ == "__main__":
    main()
