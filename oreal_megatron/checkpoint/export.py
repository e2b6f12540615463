"""Export of a run's checkpoints as Hugging Face directories.

huggingface/assets/                 config.json, tokenizer, chat template: everything but weights
huggingface/step_000050/policy/     a directory per checkpoint and model
huggingface/best                    a link to the best checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from oreal_megatron.checkpoint.store import INITIAL, CheckpointStore, step_name
from oreal_megatron.config import GeometryConfig, ModelConfig
from oreal_megatron.conversion.convert import WEIGHTS, Export
from oreal_megatron.conversion.families.decoder import Head
from oreal_megatron.conversion.huggingface import config_json, read_model
from oreal_megatron.conversion.output import copy_beside
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.files import write_atomically

_MODEL_FILES = ("config.json", "generation_config.json", "LICENSE", "NOTICE")
_HEADS: dict[str, Head] = {"policy": "causal", "reward_model": "scalar"}


class Exporter:
    """Keeps huggingface/ up to date with checkpoints/. Every method is called by all ranks."""

    def __init__(
        self,
        directory: Path,
        store: CheckpointStore,
        groups: ParallelGroups,
        *,
        which: Literal["none", "best", "every"],
        models: tuple[str, ...],
    ):
        """Makes an exporter. directory: the run's, with huggingface/assets in it. models: names in the checkpoints."""
        self._directory = directory / "huggingface"
        self._store = store
        self._groups = groups
        self._which = which
        self._models = models

    def update(self) -> None:
        """Exports the checkpoints that are missing in huggingface/, and removes those that are not wanted any more.

        Raises:
            ValueError: a checkpoint cannot be read.
            OSError: the disk refused; the checkpoint stays, and the next call exports it again.
        """
        if self._which == "none":
            return
        steps = [step_name(step) for step in self._store.steps]
        newest = self._groups.from_main(self._best()) or (steps[-1] if steps else None)
        wanted = set(steps if self._which == "every" else []) | ({newest} if newest else set())
        for name in sorted(wanted):
            # The initial checkpoint holds the policy alone.
            for model in self._models if name != INITIAL else ("policy",):
                if not self._groups.from_main((self._directory / name / model).is_dir()):
                    self._export(name, model)
        if self._groups.is_main:
            if newest:
                _link(self._directory / "best", newest)
            for path in self._directory.iterdir():
                if path.is_dir() and not path.is_symlink() and path.name not in {*wanted, "assets"}:
                    shutil.rmtree(path)
        self._groups.barrier()

    def _best(self) -> str | None:
        path = self._store.directory / "best.json"
        return json.loads(path.read_text())["checkpoint"] if path.is_file() else None

    def _export(self, name: str, model: str) -> None:
        """Exports a model of a checkpoint; the ranks share its files."""
        plan = Export.plan(
            self._store.directory / name,
            self._directory / name / model,
            prefix=f"{model}.",
            head=_HEADS[model],
            assets=self._directory / "assets",
        )
        with self._groups.together():
            if self._groups.is_main:
                plan.open()
        ranks = self._groups.world_size
        with self._groups.together():
            for shard in plan.shards[self._groups.rank :: ranks]:
                plan.write(shard)
        with self._groups.together():
            if self._groups.is_main:
                plan.commit()


def write_assets(
    directory: Path,
    geometry: GeometryConfig,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_id: int,
) -> None:
    """Writes huggingface/assets of a run: config.json, generation_config.json, and the tokenizer of its prompts.

    Files of model.path are copied where they describe the exported model. Generation ends at the token that ended the
    run's responses, or at one that model.path names.

    geometry: with vocab_size.
    """
    assets = directory / "huggingface" / "assets"
    shutil.rmtree(assets, ignore_errors=True)
    assets.mkdir(parents=True)
    if model.path is not None:
        # Of a model with another tokenizer, the tokenizer's files would stay beside the run's own.
        is_own = Path(model.tokenizer).resolve() == Path(model.path).resolve()
        copy_beside(Path(model.path), assets, without=WEIGHTS, only=None if is_own else _MODEL_FILES)
        config = dict(read_model(assets).config)
    else:
        is_own = False
        config = config_json(geometry, "causal", dtype=model.dtype, max_positions=model.max_sequence_length)
    if not is_own:
        tokenizer.save_pretrained(assets)
    path = assets / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {"pad_token_id": tokenizer.pad_token_id}
    ends = [stop_token_id, *_ends(config), *_ends(generation)]
    end = {"eos_token_id": ends[0] if len(set(ends)) == 1 else list(dict.fromkeys(ends))}
    write_atomically(assets / "config.json", json.dumps({**config, **end}, indent=2) + "\n")
    write_atomically(path, json.dumps({**generation, **end}, indent=2) + "\n")


def _ends(config: Mapping[str, Any]) -> list[int]:
    """Returns the end tokens that a config.json or generation_config.json names: none, a number, or a list."""
    ends = config.get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or ())


def _link(path: Path, target: str) -> None:
    """Makes a symbolic link, replacing an earlier one atomically."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # a copy of a run may hold a directory in the place of the link
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    os.symlink(target, new)
    os.replace(new, path)
