"""The initial policy: loaded or random weights, a supervised warm start, and its checkpoint `checkpoints/initial`.

Policy, reference and reward model start from this checkpoint, so a resumed run needs no second warm start. A run of
`run.mode: sft` starts from it too, without a warm start.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

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
from oreal_megatron.data.conversation_stream import SftData
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import Stopped
from oreal_megatron.supervised import update_supervised
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
        ValueError: model.path cannot be read.
        FloatingPointError: the warm start diverged.
    """
    config, store = workspace.config, workspace.store
    settings = initial_settings(config)
    if store.has(INITIAL):
        _check_made_from(store.directory / INITIAL, settings)
        return
    module = loaded_policy(workspace)
    if config.sft is not None and not config.is_sft:
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
    sections = ["run.seed", "model.path", "model.geometry", "model.tokenizer", "model.dtype"]
    digests = {}
    if config.model.path is not None:
        digests[f"model.path{_CONTENT}"] = weights_fingerprint(Path(config.model.path))
    if not config.is_sft:
        sections.append("sft")
    if config.sft is not None and not config.is_sft:
        sections += ["prompt.system", "prompt.user", "prompt.stop_token"]
        if not config.sft.paths:
            sections.append("data.arithmetic")
        for key, path in config.sft.paths.items():
            if Path(path).exists():
                digests[f"{key}{_CONTENT}"] = _content_digest(Path(path))
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


def _content_digest(path: Path) -> str:
    """Returns 16 hex digits that depend on the content of a file, or of all files of a directory."""
    digest = hashlib.blake2b(digest_size=8)
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
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
    """Fine-tunes by the section sft, and logs each update's loss. Nothing is saved before its end."""
    groups, data = workspace.groups, workspace.sft
    assert data is not None
    steps = sft_steps(sft, data)
    model = TrainedModel(module, sft.optimizer, groups, num_updates=steps)
    losses: list[float] = []
    with workspace.tracker.progress("warm start", steps) as bar:
        for step in range(steps):
            try:
                losses.append(update_supervised(model, data.batch(step), workspace.packer)["loss/nll"])
            except FloatingPointError as error:
                raise FloatingPointError(f"warm start, step {step}: {error}; lower sft.optimizer.lr") from error
            # After the last step the warm start is complete: it is saved, and the run stops later.
            if step + 1 < steps and groups.any_rank(workspace.stop.is_made):
                raise Stopped(
                    f"stopped after {step + 1} of {steps} steps of the warm start: nothing of it is saved, the same "
                    "command starts it again"
                )
            bar.advance(f"nll {losses[-1]:.3f}")
    workspace.tracker.trajectories("warm_start", ({"step": i, "nll": loss} for i, loss in enumerate(losses)))
    workspace.tracker.finish_trajectories()


def sft_steps(sft: SftConfig, data: SftData) -> int:
    """Returns the number of updates of fine-tuning."""
    if sft.steps is not None:
        return sft.steps
    assert sft.epochs is not None
    return data.stream.num_steps(sft.epochs)
