"""Plans which trainer rank sends which elements of which weight to which server rank.

Pure arithmetic, the same on every process that computes it. Both sides are tables over the same Hugging Face rows
(conversion/rules.py, sglang_layout.py), so every transfer is an intersection of rectangles. Elements that several
trainer ranks hold alike (data-parallel replicas, replicated norms, tied embeddings of the first and the last stage) are
sent by all of them in equal shares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.layout import Layout, shards
from oreal_megatron.conversion.rules import Box, Interval, Table, overlap
from oreal_megatron.weight_sync.sglang_layout import ServedTensor, SGLangLayout, served_tensors, whole_tensors


@dataclass(frozen=True)
class TransferOp:
    """A rectangle of elements, where it lies in a trainer's tensor and where it goes in a server's."""

    source: str
    """Megatron's name of the tensor, as in the conversion table."""
    source_box: Box
    """Place within the sender's shard."""
    target: str
    """SGLang's name of the parameter."""
    target_box: Box
    """Place within the receiver's shard."""

    @property
    def num_elements(self) -> int:
        return self.source_box.num_elements


OpWithHolders = tuple[tuple[int, ...], TransferOp]
"""A transfer op and the trainer ranks that hold its elements."""

Assignment = Mapping[tuple[int, int], tuple[TransferOp, ...]]
"""Transfer ops by (trainer rank, receiver), in an order that both compute alike.

With servers of T tensor-parallel ranks, receiver r is rank r % T of server r // T.
"""


@dataclass(frozen=True)
class ReshardingPlan:
    """The transfer ops that fill one server, each with the trainer ranks that could send it.

    The plan does not depend on the number of servers: `assign` shares the ops out among the trainer ranks.
    """

    targets: tuple[tuple[ServedTensor, ...], ...]
    """Parameters of a server, by tensor-parallel rank."""
    ops: tuple[tuple[OpWithHolders, ...], ...]
    """Ops that fill these parameters, by tensor-parallel rank."""
    num_senders: int
    """Number of trainer ranks."""

    @property
    def tensor(self) -> int:
        """Number of tensor-parallel ranks of a server."""
        return len(self.targets)

    @property
    def num_elements(self) -> int:
        """Elements that one server receives, over all of its ranks."""
        return sum(op.num_elements for ops in self.ops for _, op in ops)

    def assign(self, num_servers: int, same_device: Mapping[int, int] | None = None) -> Assignment:
        """Assigns to trainer ranks what `num_servers` servers need: every element of every receiver exactly once.

        same_device: receiver -> the trainer rank on its device, where they are colocated; that rank sends what it
        holds.
        """
        near = same_device or {}
        assigned: dict[tuple[int, int], list[TransferOp]] = defaultdict(list)
        # Elements that the same trainer ranks hold, over all receivers: each of these ranks gets a run of equal length.
        shared: dict[tuple[int, ...], list[tuple[int, TransferOp]]] = defaultdict(list)
        for receiver in range(num_servers * self.tensor):
            for holders, op in self.ops[receiver % self.tensor]:
                if near.get(receiver) in holders:
                    assigned[near[receiver], receiver].append(op)
                else:
                    shared[holders].append((receiver, op))
        for holders, items in shared.items():
            for sender, receiver, op in _share_out(holders, items):
                assigned[sender, receiver].append(op)
        return {key: tuple(assigned[key]) for key in sorted(assigned)}


def plan_resharding(table: Table, geometry: GeometryConfig, trainer: Layout, server: SGLangLayout) -> ReshardingPlan:
    """Plans how a trainer's shards fill a server: every element that a server rank needs, and nothing else.

    Raises:
        ValueError: the model does not split over the trainer's or over a server's ranks.
    """
    trainer.check(geometry)
    server.check(geometry)
    holders = _holders(table, geometry, trainer)
    targets = tuple(tuple(served_tensors(table, geometry, server, rank)) for rank in range(server.tensor))
    ops = tuple(tuple(_needed(table, tensors, holders)) for tensors in targets)
    return ReshardingPlan(targets, ops, trainer.num_ranks)


def plan_gathering(table: Table, geometry: GeometryConfig, trainer: Layout) -> dict[str, dict[int, list[TransferOp]]]:
    """Plans how whole Hugging Face tensors are gathered from the trainer's shards.

    Returns:
        Hugging Face tensor -> trainer rank -> ops; every element once, from the first rank that holds it.
    """
    trainer.check(geometry)
    holders = _holders(table, geometry, trainer)
    gathered: dict[str, dict[int, list[TransferOp]]] = {}
    for tensor in whole_tensors(table):
        by_rank: dict[int, list[TransferOp]] = defaultdict(list)
        for ranks, op in _needed(table, [tensor], holders):
            by_rank[ranks[0]].append(op)
        gathered[tensor.name] = dict(by_rank)
    return gathered


def ops_by_receiver(assignment: Assignment, sender: int) -> dict[int, tuple[TransferOp, ...]]:
    """Returns what a trainer rank sends, by receiver."""
    return {receiver: ops for (rank, receiver), ops in assignment.items() if rank == sender}


def ops_by_sender(assignment: Assignment, receiver: int) -> dict[int, tuple[TransferOp, ...]]:
    """Returns what a receiver is sent, by trainer rank."""
    return {sender: ops for (sender, to), ops in assignment.items() if to == receiver}


def num_elements(ops: Iterable[TransferOp]) -> int:
    """Counts the elements of several transfer ops."""
    return sum(op.num_elements for op in ops)


def buckets(ops: Sequence[TransferOp], max_elements: int) -> Iterator[tuple[TransferOp, ...]]:
    """Groups ops into runs of at most `max_elements` elements; larger ops are cut by rows (a row is never cut)."""
    bucket: list[TransferOp] = []
    room = max_elements
    for op in ops:
        rest: TransferOp | None = op
        while rest is not None:
            width = rest.num_elements // rest.source_box.shape[0]
            if room < width and bucket:
                yield tuple(bucket)
                bucket, room = [], max_elements
            head, rest = _cut(rest, max(room // width, 1) * width)
            bucket.append(head)
            room -= head.num_elements
    if bucket:
        yield tuple(bucket)


_Holders = Mapping[str, Mapping[tuple[Box, int], tuple[int, ...]]]
"""Megatron tensor -> (rectangle of it, first row of the rectangle within the shards that hold it) -> these ranks."""


def _holders(table: Table, geometry: GeometryConfig, trainer: Layout) -> _Holders:
    """Finds the trainer ranks that hold each rectangle; rectangles that several shards hold alike occur once."""
    found: dict[str, dict[tuple[Box, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for shard in shards(table, trainer, geometry.num_layers):
        first_row = 0
        for box in shard.boxes:
            found[shard.entry.name][box, first_row] += trainer.replicas(shard.pipeline_rank, shard.tensor_rank)
            first_row += box.shape[0]
    return {
        name: {place: tuple(sorted(ranks)) for place, ranks in by_place.items()} for name, by_place in found.items()
    }


def _needed(table: Table, tensors: Sequence[ServedTensor], holders: _Holders) -> Iterator[OpWithHolders]:
    """Yields the ops that fill a receiver's tensors; ops that are neighbours on both sides become one."""
    for tensor in tensors:
        found = [
            (ranks, op)
            for part in tensor.parts
            for piece in table.origins[part.source].sources(part.box)
            for (box, first_row), ranks in holders[piece.source].items()
            if (op := _common(piece.source, piece.box, box, first_row, tensor.name, part.at[0] + piece.at[0]))
        ]
        found.sort(key=lambda item: (item[1].target_box.columns or (0, 0), item[1].target_box.rows))
        yield from _merged(found)


def _common(
    source: str, needed: Box, owned: Box, first_shard_row: int, target: str, first_target_row: int
) -> TransferOp | None:
    """Returns the op for the elements that two rectangles of Megatron tensor `source` share, or None.

    owned: rectangle whose rows begin at row `first_shard_row` of a shard. needed: rectangle whose rows begin at row
    `first_target_row` of the target.
    """
    if (rows := overlap(needed.rows, owned.rows)) is None:
        return None
    columns = needed.columns
    if columns is not None and owned.columns is not None and (columns := overlap(columns, owned.columns)) is None:
        return None
    return TransferOp(
        source,
        Box(
            _shifted(rows, first_shard_row - owned.rows[0]),
            columns and owned.columns and _shifted(columns, -owned.columns[0]),
        ),
        target,
        Box(
            _shifted(rows, first_target_row - needed.rows[0]),
            columns and needed.columns and _shifted(columns, -needed.columns[0]),
        ),
    )


def _merged(found: Sequence[OpWithHolders]) -> Iterator[OpWithHolders]:
    current: OpWithHolders | None = None
    for holders, op in found:
        if current is not None and current[0] == holders and (both := _stacked(current[1], op)) is not None:
            current = (holders, both)
            continue
        if current is not None:
            yield current
        current = (holders, op)
    if current is not None:
        yield current


def _stacked(above: TransferOp, below: TransferOp) -> TransferOp | None:
    """Returns two ops as one, if the rows of `below` follow those of `above` on both sides."""
    pairs = ((above.source_box, below.source_box), (above.target_box, below.target_box))
    if above.source != below.source or any(a.columns != b.columns or a.rows[1] != b.rows[0] for a, b in pairs):
        return None
    source, target = (Box((a.rows[0], b.rows[1]), a.columns) for a, b in pairs)
    return replace(above, source_box=source, target_box=target)


def _share_out(
    holders: Sequence[int], items: Sequence[tuple[int, TransferOp]]
) -> Iterator[tuple[int, int, TransferOp]]:
    """Cuts (receiver, op) pairs into one run of equal length a holder, and yields (holder, receiver, op).

    Runs keep connections few; the holders' shares differ by at most a row.
    """
    share = -(-num_elements(op for _, op in items) // len(holders))
    done = 0
    for receiver, op in items:
        rest: TransferOp | None = op
        while rest is not None:
            index = min(done // share, len(holders) - 1)
            head, rest = _cut(rest, (index + 1) * share - done)
            done += head.num_elements
            yield holders[index], receiver, head


def _cut(op: TransferOp, max_elements: int) -> tuple[TransferOp, TransferOp | None]:
    """Splits an op into the rows that begin within `max_elements`, and the other rows (None if there are none)."""
    num_rows = op.source_box.shape[0]
    width = op.num_elements // num_rows
    head_rows = -(-max_elements // width)
    if head_rows >= num_rows:
        return op, None
    return _rows(op, 0, head_rows), _rows(op, head_rows, num_rows)


def _rows(op: TransferOp, start: int, stop: int) -> TransferOp:
    def within(box: Box) -> Box:
        return Box((box.rows[0] + start, box.rows[0] + stop), box.columns)

    return replace(op, source_box=within(op.source_box), target_box=within(op.target_box))


def _shifted(interval: Interval, by: int) -> Interval:
    return interval[0] + by, interval[1] + by
