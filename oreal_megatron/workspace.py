"""The workspace of a run: what is there before its models are, from process groups and log files to the data."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from oreal_megatron.checkpoint.manifest import read_manifest
from oreal_megatron.checkpoint.store import INITIAL, CheckpointStore
from oreal_megatron.config import ConfigError, GeometryConfig, TrainConfig, Violation, check_layout, check_resume
from oreal_megatron.data.arithmetic import ArithmeticData, generate_arithmetic
from oreal_megatron.data.conversation_stream import SftData, read_sft_data
from oreal_megatron.data.golds import check_golds
from oreal_megatron.data.packing import Packer
from oreal_megatron.data.prompting import PromptRenderer, has_clock
from oreal_megatron.data.prompts import read_prompts, warn_of_benchmarks, warn_of_common
from oreal_megatron.data.tokenizer import load_tokenizer
from oreal_megatron.directory_lock import check_shared, locked
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.extensions import reward_function
from oreal_megatron.files import write_atomically
from oreal_megatron.log import run_logging
from oreal_megatron.machine.requirements import check_machine
from oreal_megatron.metrics import Tracker
from oreal_megatron.preflight import check_startable, geometry_of_run
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.stopping import StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.types import Benchmark, Prompt
from oreal_megatron.verifier import StagedVerifier, build_verifier

logger = logging.getLogger(__name__)

_CONFIG_FILES = ("config.yaml", "journal/config.yaml")
# What a run leaves that depends on its configuration.
_STATE_FILES = ("checkpoints/initial", "checkpoints/step_*", "journal/*.jsonl", "pass_rates.jsonl")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Everything that a run's models are built from, and trained with."""

    config: TrainConfig
    directory: Path
    groups: ParallelGroups
    tracker: Tracker
    timeline: Timeline
    verifier: StagedVerifier
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    journal: RolloutJournal
    store: CheckpointStore
    geometry: GeometryConfig
    """Shape of policy, reference and reward model, with vocab_size."""
    vocab_size: int
    """Rows of the embedding, without padding: those of config.json or model.geometry, whatever the tokenizer has."""
    packer: Packer
    generated: ArithmeticData | None
    """Generated problems and demonstrations, where data.arithmetic is given."""
    train_prompts: Sequence[Prompt]
    benchmarks: Sequence[Benchmark]
    sft: SftData | None
    """Conversations of supervised fine-tuning, or of a warm start that is still to come."""
    stop: StopRequest
    close_later: Callable[[Callable[[], None]], object]
    """Registers a function that is called when the workspace is closed; the last one registered is called first."""


@contextlib.contextmanager
def opened_workspace(config: TrainConfig, stop: StopRequest) -> Iterator[Workspace]:
    """Checks the machine, joins the job's processes, claims the run's directory, and reads the data; closes it all.

    Raises:
        ConfigError: the configuration does not fit the machine, or the directory holds a run of another configuration.
        OSError: another live run has the directory, it cannot be written to, or a rank has another one there.
        ValueError: data, tokenizer, model directory or layout cannot be used.
        Stopped: a stop was asked for while conversations of supervised fine-tuning were encoded.
    """
    check_host(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    directory = Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_backend())
        groups = stack.enter_context(parallel_groups(config.parallel, seed=config.run.seed))
        held, max_wait_seconds = "", config.parallel.timeout_seconds / 2  # the other ranks wait in a collective
        with groups.together():
            if groups.is_main:
                held = stack.enter_context(locked(directory, max_wait_seconds=max_wait_seconds))
        held = groups.from_main(held)
        with groups.together():
            if not groups.is_main:
                check_shared(directory, held, rank=groups.rank, max_wait_seconds=max_wait_seconds)
        tokenizer = load_tokenizer(config.model.tokenizer)
        if has_clock(tokenizer):
            config = with_day(directory, config, groups)
        claim_directory(directory, config, groups)
        with groups.together():
            tracker = stack.enter_context(contextlib.closing(Tracker(config, directory, is_main=groups.is_main)))
        console = tracker.console if groups.is_main else None
        stack.enter_context(run_logging(directory, rank=groups.rank, level=config.tracking.log_level, console=console))
        logger.info(
            "%s: %s, seed %d, in %s",
            config.run.name,
            _work(config),
            config.run.seed,
            directory,
        )
        timeline = Timeline(directory / "timeline", config.tracking.timeline, rank=groups.rank)
        stack.callback(timeline.close)
        verifier = stack.enter_context(contextlib.closing(build_verifier(config.verifier, reward_function(config))))
        journal = stack.enter_context(contextlib.closing(RolloutJournal(directory / "journal", groups)))
        geometry = geometry_of_run(config.model)
        check_layout(geometry, config.parallel, config.rollout.sglang)
        vocab_size = geometry.vocab_size or len(tokenizer)
        geometry = geometry.model_copy(update={"vocab_size": vocab_size})
        renderer = PromptRenderer(tokenizer, config.prompt, vocab_size=vocab_size)
        if renderer.may_exceed_model:
            logger.warning(
                "model.tokenizer = %s has token ids beyond the %d rows of the model's embedding: they are never "
                "generated, and a prompt or demonstration that has one is refused",
                config.model.tokenizer,
                vocab_size,
            )
        generated = generate_arithmetic(config.data.arithmetic, config.run.seed) if config.data.arithmetic else None
        store = CheckpointStore(
            directory / "checkpoints",
            groups,
            keep=config.run.keep_checkpoints,
            on_saved=lambda oldest: journal.drop(before_step=oldest),
        )
        # All data are read before anything is made that ties the directory to these settings.
        train_prompts = _train_prompts(config, renderer, generated)
        benchmarks = _benchmarks(config, renderer, generated)
        warn_of_benchmarks(train_prompts, benchmarks)
        sft = None
        if config.sft is not None and (config.is_sft or not store.has(INITIAL)):
            sft = read_sft_data(
                config.sft,
                renderer,
                generated,
                groups,
                stop,
                directory=directory / "conversations",
                max_tokens=config.model.max_sequence_length,
                seed=config.run.seed,
                progress=tracker.progress,
            )
        yield Workspace(
            config=config,
            directory=directory,
            groups=groups,
            tracker=tracker,
            timeline=timeline,
            verifier=verifier,
            tokenizer=tokenizer,
            renderer=renderer,
            journal=journal,
            store=store,
            geometry=geometry,
            vocab_size=vocab_size,
            packer=Packer.of_layout(
                groups,
                geometry,
                vocab_size,
                fp8=config.fp8,
                can_share_prompts=config.model.implementation == "local",
            ),
            generated=generated,
            train_prompts=train_prompts,
            benchmarks=benchmarks,
            sft=sft,
            stop=stop,
            close_later=stack.callback,
        )


def _work(config: TrainConfig) -> str:
    """Returns what a run does, for its first line in the log."""
    if config.is_sft and config.sft is not None:
        steps, epochs = config.sft.steps, config.sft.epochs
        return f"{f'{steps} steps' if steps is not None else f'{epochs:g} epochs'} of supervised fine-tuning"
    return f"{config.run.num_steps} steps of {config.objective.preset}" if config.run.num_steps else "no training"


def check_host(config: TrainConfig) -> None:
    """Raises ConfigError, with this machine's name, where the configuration asks for what this process does not have.

    Machines differ, and the others wait for this one: the error says where to look.
    """
    try:
        check_startable(config, int(os.environ.get("WORLD_SIZE", "1")))
        check_machine(config, geometry_of_run)
        check_device(config.resources.device)
    except ConfigError as error:
        raise ConfigError(error.violations, host=socket.gethostname()) from error


def check_device(device: str) -> None:
    """Raises ConfigError unless this process computes on the kind of device that `resources.device` names."""
    if torch.cuda.is_available() != (device != "cpu"):
        seen = "a GPU" if torch.cuda.is_available() else "no GPU"
        remedy = (
            f"CUDA was asked for devices before this run began, and torch sees {seen} in this process from then on. "
            "Start the run in a process of its own, such as a job of hydra/launcher=slurm."
        )
        raise ConfigError([Violation("resources.device", device, remedy)])


def with_day(directory: Path, config: TrainConfig, groups: ParallelGroups) -> TrainConfig:
    """Returns the configuration with a day in prompt.date: its own, that of the run in the directory, or today.

    A run of version 0.1.0 goes on without one.
    """
    if config.prompt.date is not None:
        return config
    day = None
    with groups.together():
        if groups.is_main:
            paths = [directory / name for name in _CONFIG_FILES if (directory / name).is_file()]
            if paths and _has_state(directory):
                day = yaml.safe_load(paths[0].read_text())["prompt"].get("date")
            else:
                day = datetime.now().date().isoformat()
    prompt = config.prompt.model_copy(update={"date": groups.from_main(day)})
    return config.model_copy(update={"prompt": prompt})


def _has_state(directory: Path) -> bool:
    """Returns whether a run left in the directory what depends on its configuration."""
    return any(next(directory.glob(pattern), None) for pattern in _STATE_FILES)


def claim_directory(directory: Path, config: TrainConfig, groups: ParallelGroups) -> None:
    """Writes config.yaml, unless the directory holds the state of a run that was configured otherwise.

    The journal has a copy, so that its rollouts are not taken for another run's where config.yaml was removed, and
    every checkpoint names its settings. A directory without checkpoints, rollouts and pass rates takes any
    configuration.

    Raises:
        ConfigError: with every key that differs and may not. On ranks other than the main one, an OSError says so.
        OSError: the directory cannot be written to.
    """
    with groups.together():
        if groups.is_main:
            paths = [directory / name for name in _CONFIG_FILES]
            if _has_state(directory):
                for path in paths:
                    if path.is_file():
                        check_resume(yaml.safe_load(path.read_text()), config, str(path))
                for checkpoint in sorted((directory / "checkpoints").glob("step_??????"))[-1:]:
                    # Without settings: it is damaged, or of version 0.1.0.
                    if settings := (read_manifest(checkpoint) or {}).get("made_from"):
                        check_resume(settings, config, str(checkpoint))
            for path in paths:
                write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _train_prompts(config: TrainConfig, renderer: PromptRenderer, generated: ArithmeticData | None) -> list[Prompt]:
    if config.data.train is None:
        # The configuration has no prompts where run.num_steps is 0 alone.
        return [] if generated is None else _fitting(generated.train, "data.arithmetic", renderer, config)
    found: list[Prompt] = []
    names = config.data.train if isinstance(config.data.train, Mapping) else [None]
    for name, (key, path) in zip(names, config.data.train_paths.items(), strict=True):
        place = f"{key} = {path}"
        prompts = read_prompts(path, empty_golds=config.data.empty_golds, source=name)
        check_golds(prompts, place, phrases_are_judged=config.verifier.judge.mode != "off")
        found += _fitting(prompts, place, renderer, config)
    warn_of_common(found)
    return found


def _benchmarks(config: TrainConfig, renderer: PromptRenderer, generated: ArithmeticData | None) -> list[Benchmark]:
    """Returns the benchmarks, each with all of its prompts.

    Raises:
        ValueError: a prompt is longer than prompt.max_prompt_tokens.
    """
    benchmarks = []
    for name, item in config.evaluation.benchmarks.items():
        if item.path is not None:
            prompts: Sequence[Prompt] = read_prompts(item.path, empty_golds=config.data.empty_golds)
        else:
            assert generated is not None
            prompts = generated.heldout
        prompts = prompts[: item.limit]
        _, overlong = renderer.without_overlong(prompts)
        if overlong:
            longest = max(len(renderer.question_ids(prompt.question)) for prompt in overlong)
            raise ValueError(
                f"evaluation.benchmarks.{name}: {len(overlong)} of {len(prompts)} prompts are longer than "
                f"prompt.max_prompt_tokens = {config.prompt.max_prompt_tokens} (first: {overlong[0].id}), and a score "
                f"without them would be that of another benchmark. Set prompt.max_prompt_tokens={longest}, or remove "
                "them from the file under another name"
            )
        benchmarks.append(Benchmark(name=name, prompts=tuple(prompts), samples=item.samples))
    return benchmarks


def _fitting(prompts: Sequence[Prompt], source: str, renderer: PromptRenderer, config: TrainConfig) -> list[Prompt]:
    """Returns the prompts that fit prompt.max_prompt_tokens; logs how many do not. source: their origin, for messages.

    Raises:
        ValueError: no prompt fits.
    """
    limit = config.prompt.max_prompt_tokens
    fitting, overlong = renderer.without_overlong(prompts)
    if not fitting:
        raise ValueError(f"{source}: every prompt is longer than prompt.max_prompt_tokens = {limit}; raise it")
    if overlong:
        logger.warning(
            "%s: %d of %d prompts left out, longer than prompt.max_prompt_tokens = %d (first: %s)",
            source,
            len(overlong),
            len(prompts),
            limit,
            overlong[0].id,
        )
    return fitting
