"""The data of supervised fine-tuning: conversations of several sources, and the order in which they train."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import random
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from oreal_megatron.config import HeldoutConfig, SftConfig, SourceConfig
from oreal_megatron.data.arithmetic import ArithmeticData
from oreal_megatron.data.conversation_files import Conversations, Progress, read_conversations
from oreal_megatron.data.conversations import of_question
from oreal_megatron.data.curation.sources import find_files
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import Stopped, StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConversationStream:
    """Endless order of conversations: epoch after epoch, each shuffled by its own seed.

    It has no state: the batch of a step is a function of the step.
    """

    sizes: tuple[int, ...]
    """Number of conversations of each source."""
    weights: tuple[float, ...]
    """Times that each conversation of a source occurs in an epoch."""
    fingerprint: str
    """Digits that depend on every token of every conversation."""
    batch_size: int
    seed: int

    @property
    def epoch_size(self) -> Fraction:
        """Conversations of an epoch, in the mean over epochs."""
        pairs = zip(self.sizes, self.weights, strict=True)
        return sum((size * Fraction(str(weight)) for size, weight in pairs), Fraction(0))

    def num_steps(self, epochs: float) -> int:
        """Returns the number of steps that have `epochs` passes; the last step may reach into the next pass."""
        return max(math.ceil(Fraction(str(epochs)) * self.epoch_size / self.batch_size), 1)

    def epoch_after(self, step: int) -> float:
        """Returns the number of passes after `step` steps."""
        return float(step * self.batch_size / self.epoch_size)

    def batch(self, step: int) -> list[int]:
        """Returns the step's conversations, as indices into the sources one after the other."""
        position = step * self.batch_size
        indices: list[int] = []
        epoch = int(position / self.epoch_size)  # or a later one, since parts of epochs are rounded down
        while len(indices) < self.batch_size:
            if (start := self._start(epoch)) <= position < self._start(epoch + 1):
                order = _order(self, epoch)
                part = order[position - start : position - start + self.batch_size - len(indices)]
                indices += part
                position += len(part)
            epoch += 1
        return indices

    def _start(self, epoch: int) -> int:
        """Returns the number of conversations before an epoch."""
        pairs = zip(self.sizes, self.weights, strict=True)
        return sum(math.floor(epoch * size * Fraction(str(weight))) for size, weight in pairs)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, to know its data again."""
        return {"data": self.fingerprint, "num_conversations": sum(self.sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks a checkpoint's `state_dict`. Raises ValueError where it is of other data."""
        if state["data"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint is of other records ({state['num_conversations']} conversations with fingerprint "
                f"{state['data']}) than sft names now ({sum(self.sizes)}, {self.fingerprint}), or of another version "
                "of this package; resume with the records of the run, or start in another run.dir"
            )


@functools.lru_cache(maxsize=2)
def _order(stream: ConversationStream, epoch: int) -> list[int]:
    """Returns the conversations of an epoch in the order in which they train."""
    chosen: list[int] = []
    offset = 0
    for place, (size, weight) in enumerate(zip(stream.sizes, stream.weights, strict=True)):
        # A source of which an epoch has a part goes through an order of its own, from epoch to epoch.
        own = list(range(size))
        random.Random(derive_seed(stream.seed, f"sft source {place}", 0)).shuffle(own)
        share = size * Fraction(str(weight))
        first, end = math.floor(epoch * share), math.floor((epoch + 1) * share)
        chosen += sorted(offset + own[number % size] for number in range(first, end))
        offset += size
    random.Random(derive_seed(stream.seed, "sft", epoch)).shuffle(chosen)
    return chosen


@dataclass(frozen=True, kw_only=True)
class SftData:
    """Conversations of supervised fine-tuning. The main rank alone has them."""

    stream: ConversationStream
    sources: Sequence[Sequence[PackedSequence]]
    """Conversations of every source; none on ranks but the main rank."""
    heldout: Sequence[PackedSequence]
    """Held-out conversations; empty on ranks but the main rank."""

    def batch(self, step: int) -> list[PackedSequence]:
        """Returns the step's conversations; none on ranks but the main rank."""
        return [self._conversation(index) for index in self.stream.batch(step)] if self.sources else []

    def _conversation(self, index: int) -> PackedSequence:
        """Returns a conversation by its index into the sources one after the other."""
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)


def read_sft_data(
    sft: SftConfig,
    renderer: PromptRenderer,
    generated: ArithmeticData | None,
    groups: ParallelGroups,
    stop: StopRequest,
    *,
    directory: Path,
    max_tokens: int,
    seed: int,
    progress: Progress,
) -> SftData:
    """Reads the sources and the held-out records on the main rank. Every rank calls it.

    generated: has the demonstrations where no source is named. directory: takes the encoded records, so that a further
    call with the same files and settings need not encode them. seed: the run's.

    Raises:
        ValueError, OSError: see `read_conversations`.
        Stopped: a stop was asked for before all records were encoded.
    """
    reading = _read(sft, renderer, generated, directory, max_tokens, progress)
    found: tuple[list[Conversations], Sequence[PackedSequence]] | None = None
    while not groups.from_main(found is not None):
        # The other ranks wait in a collective, which has a time limit, and millions of records take longer.
        end = time.monotonic() + groups.layout.timeout_seconds / 4
        with groups.together():
            while groups.is_main and found is None and time.monotonic() < end and not stop.is_made:
                try:
                    next(reading)
                except StopIteration as finished:
                    found = finished.value
        if groups.any_rank(stop.is_made):
            reading.close()
            raise Stopped("stopped while records were encoded: nothing was trained; the same command starts again")
    sources, heldout = found or ([], [])
    digests = [source.digest for source in sources]
    # A single source's digest is that of earlier versions, whose checkpoints so go on.
    fingerprint = (
        digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()
    )
    stream = ConversationStream(
        sizes=groups.from_main(tuple(map(len, sources))),
        weights=tuple(source.weight for source in (sft.sources or {}).values()) or (1.0,),
        fingerprint=groups.from_main(fingerprint),
        batch_size=sft.batch_size,
        seed=seed,
    )
    return SftData(stream=stream, sources=sources, heldout=heldout)


def _read(
    sft: SftConfig,
    renderer: PromptRenderer,
    generated: ArithmeticData | None,
    directory: Path,
    max_tokens: int,
    progress: Progress,
) -> Generator[None, None, tuple[list[Conversations], Sequence[PackedSequence]]]:
    """Reads the conversations of every source and the held-out ones, and yields now and then; returns both.

    Files of the directory that none of them needs are removed.
    """
    read = functools.partial(
        read_conversations, renderer=renderer, sft=sft, directory=directory, max_tokens=max_tokens, progress=progress
    )
    named = sft.sources or ({} if sft.demonstrations is None else {"": SourceConfig(path=sft.demonstrations)})
    if sft.heldout is not None:
        _check_other_files(sft.heldout, named)
    sources, heldout, files = [], Conversations.of([], renderer), set()
    for source in named.values():
        conversations, file = yield from read(source.path, source.split)
        sources.append(conversations)
        files.add(file)
    if not named:
        assert generated is not None
        shown = [
            of_question(one.question, one.response, f"demonstration of {one.question!r}", renderer)
            for one in generated.demonstrations
        ]
        made = Conversations.of(shown, renderer)
        sources.append(made.fitting("data.arithmetic", sft.overlong, max_tokens))
    if sft.heldout is not None:
        heldout, file = yield from read(sft.heldout.path, sft.heldout.split, limit=sft.heldout.limit)
        files.add(file)
        if num_common := heldout.num_common(sources):
            logger.warning(
                "sft.heldout.path = %s: %d of %d conversations begin with a prompt that is trained on, so their loss "
                "says less of other prompts. Remove them from the records that are trained",
                sft.heldout.path,
                num_common,
                len(heldout),
            )
    for file in set(directory.glob("*.arrow")) - files:
        file.unlink()
    return sources, heldout


def _check_other_files(heldout: HeldoutConfig, sources: Mapping[str, SourceConfig]) -> None:
    """Raises ValueError where held-out records are in a file that is trained on."""
    files = {file.resolve() for file in find_files(Path(heldout.path), heldout.split)}
    for name, source in sources.items():
        for file in find_files(Path(source.path), source.split):
            if file.resolve() in files:
                key = f"sft.sources.{name}" if name else "sft.demonstrations"
                raise ValueError(
                    f"sft.heldout.path = {heldout.path}: {file} is trained on too, by {key}, so its loss would say "
                    "nothing of other records. Set sft.heldout.split to another split, or name another file."
                )
