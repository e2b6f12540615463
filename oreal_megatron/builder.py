"""The wiring of a run: builds models, engine and exporter from an opened workspace, and trains nothing."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from oreal_megatron.checkpoint.export import Exporter, write_assets
from oreal_megatron.checkpoint.state import load_weights_only, weights_only
from oreal_megatron.checkpoint.store import INITIAL, damages_of, load_checkpoint
from oreal_megatron.config import AdamWConfig, Fp8ModelConfig, TrainConfig
from oreal_megatron.extensions import generation_function
from oreal_megatron.initial_policy import loaded_policy, new_policy, sft_steps
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.offload import FrozenModel
from oreal_megatron.models.policy import Policy
from oreal_megatron.models.reward_model import TokenRewardModel, build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import ModelChunks
from oreal_megatron.planner.memory import tokens_beside_trainer
from oreal_megatron.preflight import first_server_device, warn_of_uncorrected_tokens
from oreal_megatron.rollout.ahead import RolloutsAhead
from oreal_megatron.rollout.background_sampling import BackgroundSampling
from oreal_megatron.rollout.build_sglang import build_sglang_engine
from oreal_megatron.rollout.conversation import LoopGenerator
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.rollout.engine import ResponseGenerator, RolloutEngine
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.run_state import Run
from oreal_megatron.workspace import Workspace

logger = logging.getLogger(__name__)


def build_run(workspace: Workspace) -> Run:
    """Builds policy, reference and reward model with the weights of checkpoints/initial, and all that trains them.

    Supervised fine-tuning has the policy alone, and its conversations.

    `pass_rates.prepare` gives the run its prompt stream, and `train` the state of its newest checkpoint.

    Raises:
        ValueError: a checkpoint is damaged or does not fit the model; a server does not fit the policy.
    """
    config = workspace.config
    warn_of_uncorrected_tokens(config)
    policy = _initial_policy(workspace, config.fp8.policy)
    training, evaluating = _members(config)
    engine = _engine(workspace, policy, training)
    sampler = _sampler(workspace, engine)
    sft, num_steps = None, config.run.num_steps
    if config.is_sft:
        assert config.sft is not None and workspace.sft is not None
        sft = workspace.sft
        num_steps = sft_steps(config.sft, sft)
    return Run(
        config=config,
        directory=workspace.directory,
        groups=workspace.groups,
        packer=workspace.packer,
        tracker=workspace.tracker,
        timeline=workspace.timeline,
        store=workspace.store,
        exporter=_exporter(workspace),
        sampler=sampler,
        engine=engine,
        ahead=_rollouts_ahead(workspace, sampler, engine),
        evaluation=_background_evaluation(workspace, sampler, policy, evaluating) if evaluating else None,
        policy=_trained_policy(workspace, policy, num_steps),
        reference=None if config.is_sft else _reference(workspace),
        reward_model=_reward_model(workspace) if config.trains_reward_model else None,
        num_steps=num_steps,
        sft=sft,
        train_prompts=workspace.train_prompts,
        benchmarks=workspace.benchmarks,
        renderer=workspace.renderer,
        verifier=workspace.verifier,
        stop=workspace.stop,
    )


def build_evaluation(workspace: Workspace) -> tuple[Sampler, AbstractContextManager[None]]:
    """Builds what evaluates the model of model.path: a sampler, and the context in which it samples.

    There is the policy alone, in model.dtype: no optimizer, reference or reward model, and no checkpoint.

    Raises:
        ValueError: model.path cannot be read; a server does not fit the policy.
    """
    module = loaded_policy(workspace)
    engine = _engine(workspace, module)
    policy = FrozenModel(module, offload=workspace.config.parallel.offload)
    policy.offload()
    return _sampler(workspace, engine), engine.generation_context(policy.on_device)


def _sampler(workspace: Workspace, engine: RolloutEngine) -> Sampler:
    return Sampler(
        _response_generator(workspace, engine),
        workspace.renderer,
        workspace.verifier.grade,
        workspace.journal,
        workspace.groups,
        workspace.stop,
        max_sequence_length=workspace.config.model.max_sequence_length,
        undecided=workspace.config.rollout.undecided,
    )


def _rollouts_ahead(workspace: Workspace, sampler: Sampler, engine: RolloutEngine) -> RolloutsAhead | None:
    config = workspace.config
    if config.rollout.schedule == "in_turn":
        return None
    assert isinstance(engine, SGLangEngine)
    if config.rollout.schedule == "one_ahead" and config.rollout.mismatch is not None:
        logger.warning(
            "rollout.mismatch compares tokens of the newest weights, and rollout.schedule = one_ahead trains tokens of "
            "the weights before them: its limits hold for the first step, and after steps without an update"
        )
    ahead = RolloutsAhead(
        sampler,
        engine,
        workspace.groups,
        workspace.stop,
        config.rollout,
        run_seed=config.run.seed,
        num_steps=config.run.num_steps,
    )
    workspace.close_later(ahead.close)
    return ahead


def _background_evaluation(
    workspace: Workspace, sampler: Sampler, policy: Policy | ModelChunks, members: range
) -> BackgroundSampling:
    """Builds what samples evaluations at the servers `members`, which get the initial policy's weights."""
    engine = _engine(workspace, policy, members, weights="evaluation")
    assert isinstance(engine, SGLangEngine)
    journal = RolloutJournal(workspace.journal.directory, workspace.groups)  # keeps a file of its own open
    workspace.close_later(journal.close)
    sampling = BackgroundSampling(sampler.with_engine(engine, journal), engine, workspace.groups, workspace.stop)
    workspace.close_later(sampling.close)
    return sampling


def _members(config: TrainConfig) -> tuple[range | None, range]:
    """Returns the positions of the servers that train, None for all that there are, and of those that evaluate."""
    if config.rollout.sglang is None or not config.evaluation.servers:
        return None, range(0)
    total = config.rollout.sglang.total_servers
    return range(total - config.evaluation.servers), range(total - config.evaluation.servers, total)


def _response_generator(workspace: Workspace, engine: RolloutEngine) -> ResponseGenerator:
    """Returns the engine, or what writes responses with it by the function of rollout.generation."""
    config = workspace.config.rollout
    function = generation_function(workspace.config)
    if function is None or config.generation is None:
        return engine
    return LoopGenerator(
        engine,
        function,
        workspace.renderer,
        workspace.groups,
        workspace.stop,
        name=f"rollout.generation.function = {config.generation.function.path}",
        seconds=config.generation.seconds,
        all_units_at_once=config.sglang is not None,
    )


def _engine(
    workspace: Workspace, policy: Policy | ModelChunks, members: range | None = None, *, weights: str = ""
) -> RolloutEngine:
    """Builds an engine that generates, and publishes the initial policy's weights to it.

    members, weights: see `build_sglang_engine`.
    """
    config = workspace.config
    engine: RolloutEngine
    if not config.generates or config.rollout.sglang is None:
        engine = EmbeddedEngine(
            lambda: CachedDecoder(policy, workspace.groups, workspace.vocab_size),
            stop_token_id=workspace.renderer.stop_token_id,
            batch_size=config.rollout.batch_size,
            text_of=workspace.renderer.response_text,
        )
    else:
        servers, geometry = config.rollout.sglang, workspace.geometry
        if weights:  # the weights of the last evaluation are many updates old: no copy is kept to find what has changed
            servers = servers.model_copy(update={"full_every": 1})
        engine = build_sglang_engine(
            servers,
            policy,
            geometry,
            workspace.groups,
            directory=workspace.directory,
            stop=workspace.stop,
            timeline=workspace.timeline,
            dtype=config.served_dtype,
            stop_token_id=workspace.renderer.stop_token_id,
            max_sequence_length=config.model.max_sequence_length,
            timeout_seconds=config.parallel.timeout_seconds,
            keep_cache=config.rollout.in_flight == "keep_cache",
            model_path=config.model.path,
            kv_tokens=tokens_beside_trainer(config, servers, geometry) if servers.shares_gpus else None,
            first_device=first_server_device(servers),
            num_generations=2 if weights else 1,  # an evaluation's greedy responses, and its samples
            members=members,
            weights=weights,
        )
    workspace.close_later(engine.close)
    engine.publish(0)
    engine.offload()
    return engine


def _trained_policy(workspace: Workspace, module: Policy | ModelChunks, num_steps: int) -> TrainedModel:
    config, objective = workspace.config, workspace.config.objective
    if config.sft is not None and config.is_sft:
        return TrainedModel(module, config.sft.optimizer, workspace.groups, num_updates=num_steps)
    frozen_steps = objective.actor_freeze_steps if objective.policy_schedule == "from_first_update" else 0
    num_updates = (num_steps - frozen_steps) * objective.updates.number
    return _trained(workspace, module, config.optimizer.policy, num_updates)


def _reference(workspace: Workspace) -> FrozenModel:
    module = _initial_policy(workspace, workspace.config.fp8.reference)
    return FrozenModel(module, offload=workspace.config.parallel.offload)


def _trained(workspace: Workspace, module: Any, adamw: AdamWConfig, num_updates: int) -> TrainedModel:
    as_in_release = workspace.config.objective.optimizer == "release"
    num_updates = max(num_updates, 1)
    return TrainedModel(module, adamw, workspace.groups, num_updates=num_updates, as_in_release=as_in_release)


def _initial_policy(workspace: Workspace, fp8: Fp8ModelConfig | None) -> Policy | ModelChunks:
    module = new_policy(workspace, fp8)
    missing = load_weights_only("policy", module, workspace.store.load(INITIAL, weights_only("policy", module)))
    assert not missing, missing
    return module


def _reward_model(workspace: Workspace) -> TrainedModel:
    """Builds the reward model from the initial policy with a scalar head of zeros, or from model.reward_model."""
    config, store = workspace.config, workspace.store
    module = build_reward_model(
        workspace.geometry,
        config.model,
        workspace.groups,
        vocab_size=workspace.vocab_size,
        seed=None,
        train_head_bias=config.objective.train_head_bias,
        fp8=config.fp8.reward_model,
    )
    if config.model.reward_model is not None and not store.steps:  # a checkpoint of this run holds its reward model
        _load_reward_model(workspace, module, Path(config.model.reward_model))
    else:
        wanted = weights_only("policy", module, without=lambda key: ".output_layer." in key)
        missing = load_weights_only("policy", module, store.load(INITIAL, wanted))
        assert all("output_layer." in key for key in missing), missing
    num_updates = config.run.num_steps * config.objective.reward_model.updates
    return _trained(workspace, module, config.optimizer.reward_model, num_updates)


def _load_reward_model(workspace: Workspace, module: TokenRewardModel | ModelChunks, checkpoint: Path) -> None:
    """Loads the weights of a reward model that another run trained, in any layout.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged, has no reward model, or another geometry.
    """
    if not workspace.groups.from_main(checkpoint.is_dir()):
        raise ValueError(
            f"model.reward_model: there is no checkpoint directory {checkpoint}; name one of a run with a reward "
            "model, for example runs/NAME/checkpoints/step_000050"
        )
    try:
        wanted = weights_only("reward_model", module)
        names = list(wanted)  # loading adds the checkpoint's plain values, which are not wanted
        groups = workspace.groups
        state = load_checkpoint(checkpoint, wanted, groups, found=damages_of(checkpoint, groups))
    except ValueError as error:
        raise ValueError(f"model.reward_model: {error}") from error
    missing = load_weights_only("reward_model", module, {name: state[name] for name in names})
    assert not missing, missing


def _exporter(workspace: Workspace) -> Exporter:
    config, groups = workspace.config, workspace.groups
    with groups.together():
        if groups.is_main and config.run.export != "none":
            stop = workspace.renderer.stop_token_id
            write_assets(workspace.directory, workspace.geometry, config.model, workspace.tokenizer, stop_token_id=stop)
    models = ("policy", "reward_model") if config.trains_reward_model else ("policy",)
    return Exporter(workspace.directory, workspace.store, groups, which=config.run.export, models=models)
