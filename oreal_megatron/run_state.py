"""A run: its parts, how far it has come, and how a checkpoint saves and restores it."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oreal_megatron.checkpoint.export import Exporter
from oreal_megatron.checkpoint.state import load_trained, trained_state
from oreal_megatron.checkpoint.store import INITIAL, Best, CheckpointStore, step_name
from oreal_megatron.config import TrainConfig, settings_of
from oreal_megatron.data.conversation_stream import ConversationStream, SftData
from oreal_megatron.data.packing import Packer
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.metrics import Tracker
from oreal_megatron.models.offload import FrozenModel
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.rollout.ahead import RolloutsAhead
from oreal_megatron.rollout.background_sampling import BackgroundSampling
from oreal_megatron.rollout.engine import RolloutEngine
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.types import Benchmark, Prompt
from oreal_megatron.verifier import StagedVerifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PendingEvaluation:
    """An evaluation that is under way while the run trains."""

    step: int
    weight_version: int

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint with its weights."""
        return step_name(self.step) if self.step else INITIAL


@dataclass
class RunProgress:
    """Progress of a run: the part of a checkpoint that is neither a model nor the prompt stream."""

    step: int = 0
    """The next step."""
    num_usable_steps: int = 0
    """Steps with a usable group so far; objective.actor_freeze_steps counts these."""
    weight_version: int = 0
    """Publications of an updated policy so far: one a step that updates it, whatever objective.updates is."""
    evaluated_step: int | None = None
    """The step of the last evaluation, which may be under way."""
    pending_evaluation: PendingEvaluation | None = None
    """The evaluation that is under way, with evaluation.servers."""
    best: Best | None = None
    """The best evaluation so far."""


@dataclass(kw_only=True)
class Run:
    """Everything that training needs: the models, what generates and grades, the data, and the progress."""

    config: TrainConfig
    directory: Path
    groups: ParallelGroups
    packer: Packer
    tracker: Tracker
    timeline: Timeline
    store: CheckpointStore
    exporter: Exporter
    sampler: Sampler
    engine: RolloutEngine
    ahead: RolloutsAhead | None
    """Rollouts of the present step and later steps; None where a step generates its own (rollout.schedule)."""
    evaluation: BackgroundSampling | None
    """Sampling of evaluations while the run trains; None where training waits for them (evaluation.servers)."""
    policy: TrainedModel
    reference: FrozenModel | None
    """Frozen initial policy; None in supervised fine-tuning."""
    reward_model: TrainedModel | None
    num_steps: int
    """Steps of the whole run: run.num_steps, or the updates of supervised fine-tuning."""
    train_prompts: Sequence[Prompt]
    """Training prompts that fit prompt.max_prompt_tokens, each once."""
    stream: PromptStream = field(init=False)
    """Stream of training prompts, balanced by difficulty; set by `pass_rates.prepare`, which may have to generate."""
    sft: SftData | None
    """Conversations of supervised fine-tuning; None for all other modes."""
    benchmarks: Sequence[Benchmark]
    renderer: PromptRenderer
    verifier: StagedVerifier
    stop: StopRequest
    progress: RunProgress = field(default_factory=RunProgress)
    global_rng: random.Random = field(default_factory=random.Random)
    """Generator that objective.pair_choice=global_rng draws from, step after step."""


def stream_of(run: Run) -> PromptStream | ConversationStream:
    """Returns the stream that the run's steps draw from."""
    return run.stream if run.sft is None else run.sft.stream


def offload(run: Run) -> None:
    """Moves all models off the device, where parallel.offload asks for that."""
    for model in (run.policy, run.reward_model, run.reference):
        if model is not None:
            model.offload()


def save(run: Run, *, wait: bool) -> None:
    """Saves a checkpoint of everything that a resume needs, unless this step has one.

    Before the first step, and in rollout mode, there is nothing to save. The state of no generator but `global_rng` is
    saved: every step seeds the others from its own seed.

    wait: returns once the checkpoint is whole, also where an earlier call did not wait for it.

    Raises:
        OSError: the disk refused; earlier checkpoints are whole.
    """
    progress = run.progress
    name = step_name(progress.step)
    run.tracker.finish_trajectories()  # a resume from this checkpoint does not write them again
    if run.config.run.mode == "rollout":
        return
    if wait:
        run.store.finish(wait=True)
    if progress.step == 0 or run.store.has(name):
        run.store.remember_best(progress.best)
        return
    run.engine.offload()
    with contextlib.ExitStack() as on_device:
        on_device.enter_context(run.policy.on_device(states=True))
        state: dict[str, Any] = trained_state("policy", run.policy)
        if run.reward_model is not None:
            on_device.enter_context(run.reward_model.on_device(states=True))
            state |= trained_state("reward_model", run.reward_model)
        state["progress"] = asdict(progress)
        state["stream"] = (
            stream_of(run).state_dict()
            if run.ahead is None
            else run.stream.state_dict(waiting=run.ahead.waiting(progress.step))
        )
        state["global_rng"] = run.global_rng.getstate()
        run.store.save(
            name,
            state,
            best=progress.best,
            pending_evaluation=progress.pending_evaluation.step if progress.pending_evaluation else None,
            wait=wait or not run.config.run.async_checkpoints,
            made_from=settings_of(run.config),
        )


def restore(run: Run) -> bool:
    """Loads the newest whole checkpoint of the run's directory; returns whether there is one.

    Raises:
        ValueError: all checkpoints are damaged, or they are of other data or another model.
    """
    run.global_rng.seed(derive_seed(run.config.run.seed, "global_rng"))
    step = run.store.newest_whole()
    if step is not None:
        with contextlib.ExitStack() as on_device:
            on_device.enter_context(run.policy.on_device(states=True))
            wanted: dict[str, Any] = trained_state("policy", run.policy, is_loading=True)
            if run.reward_model is not None:
                on_device.enter_context(run.reward_model.on_device(states=True))
                wanted |= trained_state("reward_model", run.reward_model, is_loading=True)
            state = run.store.load(step_name(step), wanted)
            load_trained("policy", run.policy, state)
            if run.reward_model is not None:
                load_trained("reward_model", run.reward_model, state)
        for name, trained in (("policy", run.policy), ("reward_model", run.reward_model)):
            if trained is not None:
                key = "sft.optimizer" if run.config.is_sft else f"optimizer.{name}"
                _warn_of_schedule(key, state[f"{name}.schedule"]["lr_decay_steps"], trained)
        saved = state["progress"]
        for name, kind in (("best", Best), ("pending_evaluation", PendingEvaluation)):
            saved[name] = kind(**saved[name]) if saved.get(name) else None  # older checkpoints lack the second
        run.progress = RunProgress(**saved)
        stream_of(run).load_state_dict(state["stream"])
        run.global_rng.setstate(state["global_rng"])
        logger.info("resumed from checkpoint %s", step_name(step))
    run.store.remember_best(run.progress.best)
    return step is not None


def _warn_of_schedule(key: str, saved_decay_steps: int, trained: TrainedModel) -> None:
    """Logs a warning where the decay has another length than in the checkpoint, so that the learning rate jumps.

    key: section of the optimizer.
    """
    schedule = trained.schedule
    if schedule.lr_decay_steps != saved_decay_steps:
        logger.warning(
            "%s: the decay of the learning rate has %d updates now and had %d in the checkpoint, so update %d has a "
            "learning rate of %.3g; %s.decay_steps=%d keeps the earlier one",
            key,
            schedule.lr_decay_steps,
            saved_decay_steps,
            schedule.num_steps,
            schedule.get_lr({}),
            key,
            saved_decay_steps,
        )
