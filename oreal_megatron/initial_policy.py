"""The initial policy: loaded or random weights, a supervised warm start, and its checkpoint `checkpoints/initial`.

Policy, reference and reward model start from this checkpoint, so a resumed run needs no second warm start.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.checkpoint.manifest import read_manifest
from oreal_megatron.checkpoint.state import weights_only
from oreal_megatron.checkpoint.store import INITIAL
from oreal_megatron.config import (
    ConfigError,
    Fp8ModelConfig,
    SftConfig,
    TrainConfig,
    Violation,
    check_settings,
    settings_of,
)
from oreal_megatron.conversion.convert import WEIGHTS
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.data.arithmetic import Demonstration
from oreal_megatron.data.packing import PackedSequence, TokenBatch
from oreal_megatron.data.prompts import fingerprint, read_demonstrations
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import Stopped
from oreal_megatron.workspace import Workspace

logger = logging.getLogger(__name__)

_CONTENT = " (content)"
"""Ending of a key that holds a digest of the file or directory that the key without it names."""
_SAMPLED_BYTES = 1 << 20


def make_initial_policy(workspace: Workspace) -> None:
    """Saves the policy that the run starts from as checkpoints/initial, unless it is there.

    Raises:
        ConfigError: the checkpoint that is there was made with other settings.
        Stopped: a stop was asked for during the warm start.
        ValueError: model.path or sft.demonstrations cannot be read.
        FloatingPointError: the warm start diverged.
    """
    config, store = workspace.config, workspace.store
    settings = initial_settings(config)
    if store.has(INITIAL):
        _check_made_from(store.directory / INITIAL, settings)
        return
    module = loaded_policy(workspace)
    if config.sft is not None:
        _warm_start(module, config.sft, workspace)
    store.save(INITIAL, weights_only("policy", module), made_from=settings)


def loaded_policy(workspace: Workspace) -> Policy | ModelChunks:
    """Builds a policy on the device with the weights of model.path, or with random weights where there is no path.

    Raises:
        ValueError: model.path cannot be read.
    """
    config = workspace.config
    module = new_policy(workspace, seed=derive_seed(config.run.seed, "weights"))
    if config.model.path is not None:
        for chunk in chunks_of(module):
            load_weights(chunk, Path(config.model.path), workspace.groups)
    return module


def new_policy(
    workspace: Workspace, fp8: Fp8ModelConfig | None = None, *, seed: int | None = None
) -> Policy | ModelChunks:
    """Builds a policy on the device, with random weights drawn from `seed`, or with undefined weights."""
    return build_policy(
        workspace.geometry,
        workspace.config.model,
        workspace.groups,
        vocab_size=workspace.vocab_size,
        seed=seed,
        fp8=fp8,
    )


def initial_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that the weights of the initial policy depend on, and digests of the files that they name.

    Layout and implementation are left out: they change the weights by rounding only.
    """
    sections = ["run.seed", "model.path", "model.geometry", "model.tokenizer", "model.dtype", "sft"]
    digests = {}
    if config.model.path is not None:
        digests[f"model.path{_CONTENT}"] = weights_fingerprint(Path(config.model.path))
    if config.sft is not None:
        sections += ["prompt.system", "prompt.user", "prompt.stop_token"]
        if config.sft.demonstrations is None:
            sections.append("data.arithmetic")
        elif Path(config.sft.demonstrations).is_file():
            digests[f"sft.demonstrations{_CONTENT}"] = fingerprint(read_demonstrations(config.sft.demonstrations))
    settings = settings_of(config).items()
    return digests | {key: value for key, value in settings if any(f"{key}.".startswith(f"{s}.") for s in sections)}


def weights_fingerprint(directory: Path) -> str:
    """Returns 16 hex digits that depend on the names, sizes, and parts of the content of a directory's weight files.

    The first, the middle and the last MiB of every file are read: tensors' names and shapes, and samples of values.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in directory.iterdir() if path.name.endswith(WEIGHTS)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - _SAMPLED_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _check_made_from(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError where the checkpoint was made with other settings, or from files that have changed since.

    A checkpoint of version 0.1.0 names no settings. A file that was removed since is not needed any more.
    """
    made_from = (read_manifest(checkpoint) or {}).get("made_from")
    if made_from is None:
        return
    before, now = ({k: v for k, v in some.items() if not k.endswith(_CONTENT)} for some in (made_from, settings))
    check_settings(before, now, str(checkpoint))
    remedy = f"Its content has changed since {checkpoint} was made from it. Restore it, or name another run.dir."
    changed = sorted(
        key.removesuffix(_CONTENT)
        for key in made_from.keys() & settings.keys()
        if key.endswith(_CONTENT) and made_from[key] != settings[key]
    )
    if changed:
        raise ConfigError([Violation(key, settings[key], remedy) for key in changed])


def _warm_start(module: Policy | ModelChunks, sft: SftConfig, workspace: Workspace) -> None:
    """Trains on the responses of demonstrations by maximum likelihood, and logs each step's loss."""
    groups = workspace.groups
    model = TrainedModel(module, sft.optimizer, groups, num_updates=sft.steps)
    batches = _batches(_demonstrations(sft, workspace), sft.batch_size, workspace.config.run.seed)
    losses: list[float] = []
    with workspace.tracker.progress("warm start", sft.steps) as bar:
        for step, batch in zip(range(sft.steps), batches, strict=False):
            losses.append(_supervised_step(model, batch, step, workspace))
            # After the last step the warm start is complete: it is saved, and the run stops later.
            if step + 1 < sft.steps and groups.any_rank(workspace.stop.is_made):
                raise Stopped(
                    f"stopped after {step + 1} of {sft.steps} steps of the warm start: nothing of it is saved, the "
                    "same command starts it again"
                )
            bar.advance(f"nll {losses[-1]:.3f}")
    workspace.tracker.trajectories("warm_start", ({"step": i, "nll": loss} for i, loss in enumerate(losses)))
    workspace.tracker.finish_trajectories()


def _supervised_step(model: TrainedModel, batch: Sequence[Demonstration], step: int, workspace: Workspace) -> float:
    """Makes one update on `batch`; returns the mean negative log-likelihood of its tokens, in nats, over all ranks."""
    renderer = workspace.renderer
    chosen = [
        PackedSequence(
            id=f"demonstration of {demonstration.question!r}",
            prompt_ids=renderer.question_ids(demonstration.question),
            response_ids=renderer.response_ids(demonstration.response),
        )
        for demonstration in batch
    ]
    num_tokens = sum(len(sequence.response_ids) for sequence in chosen)

    def negative_log_likelihood(output: Tensor, batch: TokenBatch) -> tuple[Tensor, float]:
        loss = -output[batch.predicting, 0].sum() / num_tokens
        return loss, loss.item()

    losses = model.forward_backward(workspace.packer.batches(chosen), negative_log_likelihood)
    try:
        model.update()
    except FloatingPointError as error:
        raise FloatingPointError(
            f"warm start, step {step}: {error} (losses {losses}); lower sft.optimizer.lr"
        ) from error
    return workspace.groups.sum_over_data(torch.tensor(sum(losses))).item()


def _demonstrations(sft: SftConfig, workspace: Workspace) -> Sequence[Demonstration]:
    if sft.demonstrations is not None:
        demonstrations: Sequence[Demonstration] = read_demonstrations(sft.demonstrations)
    else:
        assert workspace.generated is not None
        demonstrations = workspace.generated.demonstrations
    if workspace.renderer.may_exceed_model:  # refused here, and not in the middle of the warm start
        for demonstration in demonstrations:
            workspace.renderer.question_ids(demonstration.question)
            workspace.renderer.response_ids(demonstration.response)
    return demonstrations


def _batches(demonstrations: Sequence[Demonstration], size: int, seed: int) -> Iterator[list[Demonstration]]:
    """Yields batches without end: epoch after epoch, each in its own order."""

    def in_order() -> Iterator[Demonstration]:
        for epoch in itertools.count():
            order = list(demonstrations)
            random.Random(derive_seed(seed, "sft", epoch)).shuffle(order)
            yield from order

    endless = in_order()
    while True:
        yield list(itertools.islice(endless, size))
