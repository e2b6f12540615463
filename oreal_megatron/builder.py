"""The only wiring: from a validated configuration to the concrete objects of a run."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from oreal_megatron.checkpoint.export import Exporter, write_assets
from oreal_megatron.checkpoint.state import load_weights_only, weights_only
from oreal_megatron.checkpoint.store import INITIAL, CheckpointStore, damages_of, load_checkpoint
from oreal_megatron.config import (
    AdamWConfig,
    Fp8ModelConfig,
    SftConfig,
    SGLangConfig,
    TrainConfig,
    check_layout,
)
from oreal_megatron.conversion.huggingface import served_config
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.data.arithmetic import Demonstration, generate_arithmetic
from oreal_megatron.data.packing import Packer
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.prompts import balanced, read_demonstrations, read_prompts
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.data.tokenizer import load_tokenizer
from oreal_megatron.distributed.cpu_backend import cpu_backend, device
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.evaluation import Benchmark
from oreal_megatron.log import run_logging
from oreal_megatron.machine.requirements import check_machine
from oreal_megatron.metrics import Tracker
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.offload import FrozenModel
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.models.reward_model import TokenRewardModel, build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of
from oreal_megatron.pass_rates import with_pass_rates
from oreal_megatron.preflight import check_startable, first_server_device, geometry_of_run
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.rollout.engine import RolloutEngine
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.seeds import derive_seed
from oreal_megatron.servers.fingerprint import Fingerprint, check_server
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.server import ServerSettings
from oreal_megatron.servers.server_process import Launcher, start_directory
from oreal_megatron.sft import warm_start
from oreal_megatron.stopping import Stopped, StopRequest
from oreal_megatron.train import Run
from oreal_megatron.types import Prompt
from oreal_megatron.verifier import Verifier, build_verifier
from oreal_megatron.weight_sync.publisher import build_publisher
from oreal_megatron.weight_sync.sglang_layout import LOADER
from oreal_megatron.weight_sync.source import PolicyShards

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def opened_run(config: TrainConfig, stop: StopRequest) -> Iterator[Run]:
    """Builds everything that `train` needs, the initial policy and the pass rates included, and closes it after.

    Raises:
        Stopped: `stop` was asked for on the way.
        ValueError: data, tokenizer, model directory or layout are not usable; the message names what and why.
    """
    check_startable(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_machine(config, geometry_of_run)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    directory = Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_backend())
        groups = stack.enter_context(parallel_groups(config.parallel, seed=config.run.seed))
        tracker = stack.enter_context(contextlib.closing(Tracker(config, directory, is_main=groups.is_main)))
        console = tracker.console if groups.is_main else None
        stack.enter_context(run_logging(directory, rank=groups.rank, level=config.tracking.log_level, console=console))
        logger.info(
            "%s: %d steps of %s, seed %d, in %s",
            config.run.name,
            config.run.num_steps,
            config.objective.preset,
            config.run.seed,
            directory,
        )
        verifier = stack.enter_context(contextlib.closing(build_verifier(config.verifier)))
        tokenizer = load_tokenizer(config.model.tokenizer)
        journal = stack.enter_context(contextlib.closing(RolloutJournal(directory / "journal", groups)))
        yield _Builder(config, directory, groups, tracker, verifier, tokenizer, journal, stop, stack).run()


class _Builder:
    """Builds the parts of one run in the order in which they need each other."""

    def __init__(
        self,
        config: TrainConfig,
        directory: Path,
        groups: ParallelGroups,
        tracker: Tracker,
        verifier: Verifier,
        tokenizer: PreTrainedTokenizerBase,
        journal: RolloutJournal,
        stop: StopRequest,
        closing: contextlib.ExitStack,
    ):
        """closing: takes what must be closed after the run."""
        self.closing = closing
        self.config = config
        self.directory = directory
        self.groups = groups
        self.tracker = tracker
        self.verifier = verifier
        self.tokenizer = tokenizer
        self.journal = journal
        self.stop = stop
        self.renderer = PromptRenderer(tokenizer, config.prompt)
        self.geometry = geometry_of_run(config.model)
        check_layout(self.geometry, config.parallel, config.rollout.sglang)
        self.vocab_size = max(self.geometry.vocab_size or 0, len(tokenizer))
        self.packer = Packer.of_layout(groups, self.geometry, self.vocab_size, fp8=config.fp8)
        self.generated = (
            generate_arithmetic(config.data.arithmetic, config.run.seed) if config.data.arithmetic else None
        )
        self.store = CheckpointStore(
            directory / "checkpoints",
            groups,
            keep=config.run.keep_checkpoints,
            on_saved=lambda oldest: journal.drop(before_step=oldest),
        )

    def run(self) -> Run:
        config = self.config
        train_prompts = self._prompts(config.data.train, "train")
        benchmarks = self._benchmarks()
        if not self.store.has(INITIAL):
            self._make_initial_policy()
        policy = self._initial_policy(config.fp8.policy)
        engine = self._engine(policy)
        sampler = Sampler(
            engine,
            self.renderer,
            self.verifier.grade,
            self.journal,
            self.groups,
            self.stop,
            max_sequence_length=config.model.max_sequence_length,
        )
        if config.data.pass_rate is not None:
            with engine.generation_context(contextlib.nullcontext):
                train_prompts = with_pass_rates(
                    train_prompts,
                    config,
                    sampler,
                    directory=self.directory,
                    groups=self.groups,
                    tracker=self.tracker,
                    journal=self.journal,
                )
        engine.offload()
        stream = PromptStream(
            balanced(train_prompts, config.data.difficulty_balance),
            prompts_per_step=config.num_asked_prompts,
            seed=config.run.seed,
        )
        frozen = config.objective.actor_freeze_steps
        from_first_update = config.objective.policy_schedule == "from_first_update"
        return Run(
            config=config,
            directory=self.directory,
            groups=self.groups,
            packer=self.packer,
            tracker=self.tracker,
            store=self.store,
            exporter=self._exporter(),
            stream=stream,
            sampler=sampler,
            engine=engine,
            policy=self._trained(policy, config.optimizer.policy, less=frozen if from_first_update else 0),
            reference=FrozenModel(self._initial_policy(config.fp8.reference), offload=config.parallel.offload),
            reward_model=self._reward_model() if config.objective.uses_reward_model else None,
            benchmarks=benchmarks,
            renderer=self.renderer,
            stop=self.stop,
        )

    def _engine(self, policy: Policy | ModelChunks) -> RolloutEngine:
        """What generates, with the initial policy's weights."""
        config = self.config
        engine: RolloutEngine
        if config.run.mode == "replay" or config.rollout.sglang is None:
            engine = EmbeddedEngine(
                lambda: CachedDecoder(policy, self.groups, self.vocab_size),
                stop_token_id=self.renderer.stop_token_id,
                batch_size=config.rollout.batch_size,
            )
        else:
            engine = self._sglang_engine(policy, config.rollout.sglang)
        self.closing.callback(engine.close)
        engine.publish(0)
        return engine

    def _sglang_engine(self, policy: Policy | ModelChunks, servers: SGLangConfig) -> SGLangEngine:
        config = self.config
        geometry = self.geometry.model_copy(update={"vocab_size": self.vocab_size})
        described = served_config(
            config.model.path,
            geometry,
            dtype=config.served_dtype,
            fp8=servers.dtype == "fp8",
            max_positions=config.model.max_sequence_length,
            stop_token_id=self.renderer.stop_token_id,
        )
        expected = Fingerprint.of(geometry, config.served_dtype, described)
        launcher = Launcher(
            config=servers,
            model=start_directory(self.directory / "servers"),
            weight_loader=LOADER,
            dtype=config.served_dtype,
            max_sequence_length=config.model.max_sequence_length,
            logs=self.directory / "servers",
            first_device=first_server_device(servers),
        )
        settings = ServerSettings(
            config=servers,
            launcher=launcher,
            check=lambda url, description: check_server(url, description, expected),
        )
        pool = ServerPool(settings, stop_token_id=self.renderer.stop_token_id, config_json=described)
        publisher = build_publisher(
            servers,
            PolicyShards(chunks_of(policy), geometry, self.groups, getattr(torch, config.served_dtype)),
            directory=Path(servers.weights_dir) if servers.weights_dir is not None else self.directory / "weights",
            config_json=described,
        )
        return SGLangEngine(
            pool,
            publisher,
            self.groups,
            vocab_size=self.vocab_size,
            timeout_seconds=config.parallel.timeout_seconds,
            shares_devices=servers.shares_devices,
        )

    def _trained(self, module: Any, adamw: AdamWConfig, *, less: int = 0) -> TrainedModel:
        return TrainedModel(module, adamw, self.groups, num_updates=max(self.config.run.num_steps - less, 1))

    def _prompts(self, path: str | None, name: str) -> list[Prompt]:
        """Prompts of a file or of the generated data; those that are too long are left out, and counted."""
        if path is not None:
            prompts: Sequence[Prompt] = read_prompts(path)
        else:
            assert self.generated is not None
            prompts = self.generated.train if name == "train" else self.generated.heldout
        fitting, overlong = self.renderer.without_overlong(prompts)
        if overlong:
            logger.warning(
                "%s: %d of %d prompts left out, longer than prompt.max_prompt_tokens = %d (first: %s)",
                name,
                len(overlong),
                len(prompts),
                self.config.prompt.max_prompt_tokens,
                overlong[0].id,
            )
        if not fitting:
            raise ValueError(
                f"{path or name}: every prompt is longer than prompt.max_prompt_tokens = "
                f"{self.config.prompt.max_prompt_tokens}"
            )
        return fitting

    def _benchmarks(self) -> list[Benchmark]:
        return [
            Benchmark(name, tuple(self._prompts(item.path, "heldout")[: item.limit]), item.samples)
            for name, item in self.config.evaluation.benchmarks.items()
        ]

    def _make_initial_policy(self) -> None:
        """Saves the policy that the run starts from: loaded or random weights, then the warm start if there is one."""
        config = self.config
        module = self._policy_module(seed=derive_seed(config.run.seed, "weights"))
        if config.model.path is not None:
            for chunk in chunks_of(module):
                load_weights(chunk, Path(config.model.path), self.groups)
        if config.sft is not None:
            self._warm_start(module, config.sft)
        self.store.save(INITIAL, weights_only("policy", module))

    def _warm_start(self, module: Policy | ModelChunks, sft: SftConfig) -> None:
        if sft.demonstrations is not None:
            demonstrations: Sequence[Demonstration] = read_demonstrations(sft.demonstrations)
        else:
            assert self.generated is not None
            demonstrations = self.generated.demonstrations
        losses: list[float] = []
        with self.tracker.progress("warm start", sft.steps) as bar:

            def on_step(step: int, loss: float) -> None:
                losses.append(loss)
                if self.groups.any_rank(self.stop.is_made):
                    raise Stopped("stopped during the warm start, which starts anew: nothing of it is saved")
                bar.advance(f"nll {loss:.3f}")

            warm_start(
                TrainedModel(module, sft.optimizer, self.groups, num_updates=sft.steps),
                demonstrations,
                self.renderer,
                sft,
                self.groups,
                self.packer,
                seed=self.config.run.seed,
                on_step=on_step,
            )
        self.tracker.trajectories("warm_start", [{"step": i, "nll": loss} for i, loss in enumerate(losses)])

    def _policy_module(self, fp8: Fp8ModelConfig | None = None, *, seed: int | None = None) -> Policy | ModelChunks:
        module = build_policy(
            self.geometry, self.config.model, self.groups, vocab_size=self.vocab_size, seed=seed, fp8=fp8
        )
        return module.to(device())

    def _exporter(self) -> Exporter:
        config = self.config
        with self.groups.together():
            if self.groups.is_main and config.run.export != "none":
                geometry = self.geometry.model_copy(update={"vocab_size": self.vocab_size})
                stop = self.renderer.stop_token_id
                write_assets(self.directory, geometry, config.model, self.tokenizer, stop_token_id=stop)
        models = ("policy", "reward_model") if config.objective.uses_reward_model else ("policy",)
        return Exporter(self.directory, self.store, self.groups, which=config.run.export, models=models)

    def _initial_policy(self, fp8: Fp8ModelConfig | None) -> Policy | ModelChunks:
        module = self._policy_module(fp8)
        missing = load_weights_only("policy", module, self.store.load(INITIAL, weights_only("policy", module)))
        assert not missing, missing
        return module

    def _reward_model(self) -> TrainedModel:
        """The initial policy with a scalar head of zeros in the place of its output layer, or another run's."""
        module = build_reward_model(
            self.geometry,
            self.config.model,
            self.groups,
            vocab_size=self.vocab_size,
            seed=None,
            fp8=self.config.fp8.reward_model,
        ).to(device())
        if self.config.model.reward_model is not None and not self.store.steps:  # else the run's own checkpoint has it
            self._load_reward_model(module, Path(self.config.model.reward_model))
        else:
            wanted = weights_only("policy", module, without=lambda key: ".output_layer." in key)
            missing = load_weights_only("policy", module, self.store.load(INITIAL, wanted))
            assert all("output_layer." in key for key in missing), missing
        return self._trained(module, self.config.optimizer.reward_model)

    def _load_reward_model(self, module: TokenRewardModel | ModelChunks, checkpoint: Path) -> None:
        """Weights of a reward model that another run has trained, whatever its layout was.

        Raises:
            ValueError: there is no such checkpoint, or it is damaged, has no reward model, or another geometry.
        """
        if not self.groups.from_main(checkpoint.is_dir()):
            raise ValueError(f"model.reward_model: there is no checkpoint directory {checkpoint}")
        try:
            wanted = weights_only("reward_model", module)
            names = list(wanted)  # what else the checkpoint holds of plain values comes along, and stays out
            state = load_checkpoint(checkpoint, wanted, damages_of(checkpoint, self.groups))
        except ValueError as error:
            raise ValueError(f"model.reward_model: {error}") from error
        missing = load_weights_only("reward_model", module, {name: state[name] for name in names})
        assert not missing, missing
