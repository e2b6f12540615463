"""Encoded conversations as Arrow files: the records of a source are encoded once, and read where they lie.

A file's name is a digest of the source and of everything else that the token ids of its records depend on. It has every
conversation, whatever its length.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from oreal_megatron.config import SftConfig
from oreal_megatron.data.conversations import Rendered, encoded, rendered
from oreal_megatron.data.curation.sources import find_files, num_records, read_source
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.files import written_atomically

logger = logging.getLogger(__name__)

Progress = Callable[[str, int], Any]
"""(title, total) -> context of a progress bar with the method `advance`, such as Tracker.progress."""

_VERSION = 1
"""Changes with the content of the files."""
_BATCH_RECORDS, _BATCH_CHARACTERS = 1024, 1 << 22
"""Most records, and characters after which no record is added, of those that are encoded together."""
_DIGEST = b"digest"
_IDS = pyarrow.list_(pyarrow.int32())
_SCHEMA = pyarrow.schema({
    "id": pyarrow.string(),
    "key": pyarrow.binary(16),
    "prompt_ids": _IDS,
    "response_ids": _IDS,
    "loss_mask": pyarrow.list_(pyarrow.bool_()),
})  # fmt: skip


class Conversations(Sequence[PackedSequence]):
    """Conversations of Arrow batches, which may lie in a file; each is made when it is asked for."""

    def __init__(self, batches: Sequence[pyarrow.RecordBatch], digest: str, *, max_tokens: int | None = None):
        """Makes conversations of the rows of batches.

        digest: digits that depend on every token. max_tokens: length at which longer ones are cut off; None: nowhere.
        """
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._max_tokens = max_tokens
        self._kept = np.arange(self._starts[-1])
        self.digest = digest

    @classmethod
    def of(cls, records: Sequence[Rendered], renderer: PromptRenderer) -> Conversations:
        """Encodes records in memory."""
        digest = _Digest()
        return cls([_batch(records, renderer, digest)], digest.value)

    @classmethod
    def read(cls, path: Path) -> Conversations:
        """Opens a file, whose content stays on the disk."""
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        read = [reader.get_batch_with_custom_metadata(index) for index in range(reader.num_record_batches)]
        return cls([one.batch for one in read], read[-1].custom_metadata[_DIGEST].decode())

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        row = int(self._kept[index])
        place = bisect_right(self._starts, row) - 1
        columns = (column[row - self._starts[place]] for column in self._batches[place])
        id, _, prompt_ids, response_ids, loss_mask = columns
        prompt = prompt_ids.values.to_numpy()
        end = None if self._max_tokens is None else max(self._max_tokens - len(prompt), 0)
        mask = None if loss_mask.values is None else loss_mask.values.to_numpy(zero_copy_only=False)[:end]
        return PackedSequence(
            id=id.as_py(), prompt_ids=prompt, response_ids=response_ids.values.to_numpy()[:end], loss_mask=mask
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all conversations."""
        return int(self._lengths().sum())

    def fitting(self, path: str, overlong: str, max_tokens: int) -> Conversations:
        """Returns the conversations of at most `max_tokens` tokens, and those that `overlong` keeps; logs the others.

        path: their origin, for messages.

        Raises:
            ValueError: `overlong` is refuse and one is longer, or none is left.
        """
        lengths = self._lengths()
        longer = np.flatnonzero(lengths > max_tokens)
        if not len(longer):
            return self
        longest = int(lengths.max())
        problem = (
            f"{path}: {len(longer)} of {len(self)} conversations have more tokens than model.max_sequence_length = "
            f"{max_tokens} (first: {self[int(longer[0])].id}, longest: {longest})"
        )
        if overlong == "refuse":
            raise ValueError(
                f"{problem}. Set model.max_sequence_length={longest}, or sft.overlong=drop to leave them out, or "
                "sft.overlong=truncate to cut them off."
            )
        digest = hashlib.blake2b(f"{self.digest} {overlong} {max_tokens}".encode(), digest_size=8).hexdigest()
        kept = Conversations(self._batches, digest, max_tokens=max_tokens)
        # Of some, all trained tokens are behind the cut.
        lost = longer if overlong == "drop" else [row for row in longer if not kept[int(row)].num_trained_tokens]
        kept._kept = np.delete(kept._kept, lost)
        if not len(kept):
            raise ValueError(f"{problem}, and none is left. Set model.max_sequence_length={longest}.")
        cut = f"{len(longer) - len(lost)} are cut off, " if overlong == "truncate" else ""
        logger.warning("%s; %s%d are left out (sft.overlong = %s)", problem, cut, len(lost), overlong)
        return kept

    def num_common(self, others: Sequence[Conversations]) -> int:
        """Returns how many of the rows begin with the prompt of a row of others, whatever the case and punctuation."""
        mine = self._keys()
        common = {
            key
            for keys in (other._keys() for other in others)
            for key in keys.filter(pyarrow.compute.is_in(keys, value_set=mine)).to_pylist()
        }
        return sum(key in common for key in mine.to_pylist())

    def _keys(self) -> pyarrow.ChunkedArray:
        """Returns the key of every conversation's prompt."""
        return pyarrow.chunked_array([batch["key"] for batch in self._batches], _SCHEMA.field("key").type).take(
            pyarrow.array(self._kept)
        )

    def _lengths(self) -> np.ndarray:
        """Returns the number of tokens of every row."""
        parts = [
            sum(pyarrow.compute.list_value_length(batch[name]).to_numpy() for name in ("prompt_ids", "response_ids"))
            for batch in self._batches
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])


def read_conversations(
    path: str,
    split: str | None,
    renderer: PromptRenderer,
    sft: SftConfig,
    *,
    directory: Path,
    max_tokens: int,
    progress: Progress,
    limit: int | None = None,
) -> Generator[None, None, tuple[Conversations, Path]]:
    """Reads the records of a file or of a data set's directory, and yields now and then; returns them with their file.

    directory: has the encoded records of earlier calls. max_tokens: most tokens of a conversation; sft.overlong says
    what becomes of longer ones. limit: most records.

    Raises:
        ValueError: a record is no conversation, or too long under `sft.overlong: refuse`, or there is none. The message
            names file and record.
        OSError: a file cannot be read or written.
    """
    files = find_files(Path(path), split)
    file = directory / f"{_key(files, renderer, sft, limit)}.arrow"
    started, is_new = time.monotonic(), not file.is_file()
    if is_new:
        total = num_records(files) if limit is None else min(limit, num_records(files))
        records = (
            rendered(record, where, renderer, turns=sft.turns)
            for where, record in itertools.islice(read_source(files), limit)
        )
        with progress(f"tokens of {Path(path).name}", total) as bar:
            yield from _encode(records, file, path, renderer, bar)
    found = Conversations.read(file)
    logger.info(
        "%s: %s conversations, %s tokens, %s",
        path,
        f"{len(found):,}",
        f"{found.num_tokens:,}",
        f"encoded in {time.monotonic() - started:.0f} s, in {file}" if is_new else f"encoded earlier, in {file}",
    )
    return found.fitting(path, sft.overlong, max_tokens), file


def _encode(
    records: Iterable[Rendered], file: Path, path: str, renderer: PromptRenderer, bar: Any
) -> Generator[None, None, None]:
    """Writes the file of a source's records, and yields after each batch. path: the source, for messages."""
    digest, num_found, started = _Digest(), 0, time.monotonic()
    with written_atomically(file) as opened, pyarrow.ipc.new_file(opened, _SCHEMA) as writer:
        for batch in _batches(records):
            rows = _batch(batch, renderer, digest)
            writer.write_batch(rows, custom_metadata={_DIGEST: digest.value})
            num_found += rows.num_rows
            bar.advance(f"{digest.num_tokens / (time.monotonic() - started):,.0f} tokens/s", by=len(batch))
            yield
        if not num_found:
            raise ValueError(
                f"{path}: no records in it. A record has messages, or question and response, or prompt and response."
            )


def _batches(records: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        num_characters += record.num_characters
        if len(batch) == _BATCH_RECORDS or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _batch(records: Sequence[Rendered], renderer: PromptRenderer, digest: _Digest) -> pyarrow.RecordBatch:
    """Returns the rows of records, and adds them to the digest."""
    pairs = [
        (record.key, sequence)
        for record, sequences in zip(records, encoded(records, renderer), strict=True)
        for sequence in sequences
    ]
    digest.update([sequence for _, sequence in pairs])
    columns = [
        [key for key, _ in pairs] if field.name == "key" else [getattr(sequence, field.name) for _, sequence in pairs]
        for field in _SCHEMA
    ]
    arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pyarrow.record_batch(arrays, schema=_SCHEMA)


def _key(files: Sequence[Path], renderer: PromptRenderer, sft: SftConfig, limit: int | None) -> str:
    """Returns 16 hex digits that depend on the files' sizes and times, and on all that turns them into tokens."""
    # A copy of another version may keep size and time of change, and then has another inode or time of its status.
    stats = [
        (str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        for file in files
        for stat in [file.stat()]
    ]
    settings = json.dumps([_VERSION, stats, sft.turns, limit, renderer.fingerprint])
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


class _Digest:
    """Digest of every token of sequences, of their order and of what is trained."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)
        self.num_tokens = 0

    @property
    def value(self) -> str:
        return self._hash.hexdigest()

    def update(self, sequences: Sequence[PackedSequence]) -> None:
        for sequence in sequences:
            mask = np.ones(1, bool) if sequence.loss_mask is None else sequence.loss_mask
            for part in (sequence.prompt_ids, sequence.response_ids, mask):
                array = np.asarray(part)
                self._hash.update(len(array).to_bytes(8, "little") + array.astype(np.int32).tobytes())
            self.num_tokens += sequence.num_tokens
