"""`oreal-data pass-rates`: the share of a model's responses to each prompt that are correct."""

from __future__ import annotations

import argparse

from omegaconf import OmegaConf

from oreal_megatron.cli.arguments import add_overrides, add_subcommand, positive
from oreal_megatron.cli.data_reports import add_output, show
from oreal_megatron.cli.model_argument import model_settings, opened_model
from oreal_megatron.compose import validated
from oreal_megatron.config import TrainConfig


def add_pass_rates(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    command = add_subcommand(
        commands,
        "pass-rates",
        _pass_rates,
        "Writes each prompt with the share of a model's responses that are CORRECT.",
        "Settings are those of experiment=own_model, as for oreal-eval; responses are drawn by rollout.sampling. They\n"
        "stay in run.dir, by default pass_rates/NAME of the model's directory. A killed command continues when it is\n"
        "started again. Under torchrun, processes share the responses; --shard shares them over jobs.",
        example="oreal-data pass-rates models/Qwen2.5-7B train.jsonl --output rated.jsonl\n"
        "  oreal-data pass-rates models/Qwen2.5-7B train.jsonl --shard 3/16 --output rated.03.jsonl \\\n"
        "    rollout=sglang resources=h100",
    )
    command.add_argument(
        "model", metavar="MODEL", help="Hugging Face directory with config.json, weights and tokenizer"
    )
    command.add_argument("file", metavar="FILE", help="prompts: a file or directory, as data.train takes it")
    add_overrides(command)
    command.add_argument(
        "--samples", type=positive, default=8, metavar="K", help="responses for each prompt (default: %(default)s)"
    )
    command.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="take every N-th prompt from the I-th, in a run.dir of its own; the outputs of all shards may be joined",
    )
    add_output(command, required=True)


def _shard(text: str) -> tuple[int, int]:
    """Returns the index from 1 and the number of shards that an argument names."""
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/16")
    return int(index), int(number)


def _pass_rates(arguments: argparse.Namespace) -> int:
    config = pass_rate_config(arguments)
    with opened_model(config) as (workspace, sampler, weights):
        # Imported here because it imports torch, which --help should not wait for.
        from oreal_megatron.pass_rates import rate_model

        report = rate_model(workspace, sampler, arguments.output, weights=weights, shard=arguments.shard)
    if report is not None:
        show(report, arguments, title=f"{arguments.file} by {config.model.path}")
    return 0


def pass_rate_config(arguments: argparse.Namespace) -> TrainConfig:
    """Returns the configuration of an estimation: that of the overrides, with nothing that trains or evaluates.

    Raises:
        ConfigError: with all violations.
        ValueError: MODEL is no Hugging Face directory, or an override sets what the command fixes.
    """
    index, number = arguments.shard
    directory = "pass_rates/${run.name}" + (f"/shard_{index}_of_{number}" if number > 1 else "")
    raw = model_settings(arguments, command="oreal-data pass-rates", directory=directory)
    raw.data.train = arguments.file
    raw.data.pass_rate = {"samples": arguments.samples, "max_prompts": None}
    OmegaConf.update(raw, "evaluation.benchmarks", {}, merge=False)
    return validated(raw)
