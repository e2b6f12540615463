"""Who sends which rectangle of which weight to whom: pure arithmetic, the same on every process that computes it.

Both sides are tables over the same Hugging Face rows (convert/rules.py, served.py), so every copy is an intersection
of rectangles. What several trainer ranks hold alike (data-parallel replicas, replicated norms, tied embeddings of the
first and the last stage) is sent by all of them, each an equal share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.layout import Layout, shards
from oreal_megatron.conversion.rules import Box, Interval, Table, overlap
from oreal_megatron.weight_sync.sglang_layout import ServedTensor, SGLangLayout, served_tensors, whole_tensors


@dataclass(frozen=True)
class TrainerLayout:
    """The trainer's processes: one model's split, and how often it is replicated.

    Ranks are ordered as Megatron-Core orders them: tensor fastest, then context, data, pipeline.
    """

    model: Layout
    context: int = 1
    data: int = 1

    @property
    def num_ranks(self) -> int:
        return self.model.num_ranks * self.context * self.data

    def replicas(self, pipeline_rank: int, tensor_rank: int) -> tuple[int, ...]:
        """Global ranks that hold the shard (pipeline_rank, tensor_rank)."""
        copies = self.context * self.data
        first = pipeline_rank * copies * self.model.tensor + tensor_rank
        return tuple(first + copy * self.model.tensor for copy in range(copies))


@dataclass(frozen=True)
class TransferOp:
    """The same elements in a trainer's tensor and in a server's."""

    source: str
    """Megatron's name, as in the conversion table."""
    source_box: Box
    """Within the sender's shard."""
    target: str
    """SGLang's name."""
    target_box: Box
    """Within the receiver's shard."""

    @property
    def num_elements(self) -> int:
        return self.source_box.num_elements


@dataclass(frozen=True, order=True)
class ServerRank:
    """One tensor-parallel rank of one engine."""

    engine: int
    rank: int


@dataclass(frozen=True)
class ReshardingPlan:
    """All rectangles of one publication."""

    sent: Mapping[tuple[int, ServerRank], tuple[TransferOp, ...]]
    """By (trainer rank, receiver), in an order that both compute alike."""
    targets: Mapping[int, tuple[ServedTensor, ...]]
    """What rank r of every engine holds."""
    num_senders: int

    def of_sender(self, rank: int) -> dict[ServerRank, tuple[TransferOp, ...]]:
        return {receiver: items for (sender, receiver), items in self.sent.items() if sender == rank}

    def of_receiver(self, receiver: ServerRank) -> dict[int, tuple[TransferOp, ...]]:
        return {sender: items for (sender, to), items in self.sent.items() if to == receiver}

    @property
    def elements_by_sender(self) -> list[int]:
        """One number a trainer rank."""
        totals = [0] * self.num_senders
        for (sender, _), items in self.sent.items():
            totals[sender] += sum(item.num_elements for item in items)
        return totals

    @property
    def num_elements(self) -> int:
        return sum(self.elements_by_sender)


def plan_resharding(
    table: Table,
    geometry: GeometryConfig,
    trainer: TrainerLayout,
    engines: SGLangLayout,
    *,
    same_device: Mapping[ServerRank, int] | None = None,
) -> ReshardingPlan:
    """Plans one publication: every element that a receiver needs, exactly once, and nothing else.

    same_device: the trainer rank that shares a receiver's device, where they are colocated; it sends what it holds.

    Raises:
        ValueError: the model does not split over the trainer's or over an engine's ranks.
    """
    trainer.model.check(geometry)
    engines.check(geometry)
    holdings = _holdings(table, geometry, trainer)
    targets = {r: tuple(served_tensors(table, geometry, engines, r)) for r in range(engines.tensor)}
    needed = {rank: list(_needed(table, tensors, holdings)) for rank, tensors in targets.items()}
    near = same_device or {}
    sent: dict[tuple[int, ServerRank], list[TransferOp]] = defaultdict(list)
    # What the same processes hold alike, over all receivers: cut into one run of equal length for each of them.
    shared: dict[tuple[int, ...], list[tuple[ServerRank, TransferOp]]] = defaultdict(list)
    for receiver in (ServerRank(e, r) for e in range(engines.count) for r in range(engines.tensor)):
        for holders, rectangle in needed[receiver.rank]:
            if near.get(receiver) in holders:
                sent[near[receiver], receiver].append(rectangle)
            else:
                shared[holders].append((receiver, rectangle))
    for holders, items in shared.items():
        for sender, receiver, rectangle in _assigned(holders, items):
            sent[sender, receiver].append(rectangle)
    return ReshardingPlan({key: tuple(sent[key]) for key in sorted(sent)}, targets, trainer.num_ranks)


def plan_gathering(
    table: Table, geometry: GeometryConfig, trainer: TrainerLayout
) -> dict[str, dict[int, list[TransferOp]]]:
    """Hugging Face tensor -> rank -> its rectangles of it; every element once, from the first rank that holds it."""
    trainer.model.check(geometry)
    holdings = _holdings(table, geometry, trainer)
    gathered: dict[str, dict[int, list[TransferOp]]] = {}
    for tensor in whole_tensors(table):
        by_rank: dict[int, list[TransferOp]] = defaultdict(list)
        for holders, rectangle in _needed(table, [tensor], holdings):
            by_rank[holders[0]].append(rectangle)
        gathered[tensor.name] = dict(by_rank)
    return gathered


@dataclass(frozen=True)
class _Holding:
    """A rectangle of a Megatron tensor, where it lies within the shards that hold it, and which ranks those are."""

    box: Box
    first_row: int
    holders: tuple[int, ...]


def _holdings(table: Table, geometry: GeometryConfig, trainer: TrainerLayout) -> dict[str, list[_Holding]]:
    """By Megatron's name; rectangles that several shards hold alike occur once, with all holders."""
    found: dict[str, dict[tuple[Box, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for shard in shards(table, trainer.model, geometry.num_layers):
        first_row = 0
        for box in shard.boxes:
            found[shard.entry.name][box, first_row] += trainer.replicas(shard.pipeline_rank, shard.tensor_rank)
            first_row += box.shape[0]
    return {
        name: [_Holding(box, first_row, tuple(sorted(ranks))) for (box, first_row), ranks in holdings.items()]
        for name, holdings in found.items()
    }


def _needed(
    table: Table, tensors: Sequence[ServedTensor], holdings: Mapping[str, Sequence[_Holding]]
) -> Iterator[tuple[tuple[int, ...], TransferOp]]:
    """(who holds it, rectangle) for all that one receiver needs; neighbours on both sides are one rectangle."""
    for tensor in tensors:
        found = [
            (holding.holders, rectangle)
            for part in tensor.parts
            for piece in table.origins[part.source].sources(part.box)
            for holding in holdings[piece.source]
            if (rectangle := _common(piece.source, piece.box, holding, tensor.name, part.at[0] + piece.at[0]))
        ]
        found.sort(key=lambda item: (item[1].target_box.columns or (0, 0), item[1].target_box.rows))
        yield from _joined(found)


def _common(source: str, box: Box, holding: _Holding, target: str, first_target_row: int) -> TransferOp | None:
    """What `holding` has of `box`, a rectangle of Megatron tensor `source` that starts at a row of the target."""
    if (rows := overlap(box.rows, holding.box.rows)) is None:
        return None
    columns, held = box.columns, holding.box.columns
    if columns is not None and held is not None and (columns := overlap(columns, held)) is None:
        return None
    return TransferOp(
        source,
        Box(_moved(rows, holding.first_row - holding.box.rows[0]), columns and held and _moved(columns, -held[0])),
        target,
        Box(
            _moved(rows, first_target_row - box.rows[0]),
            columns and box.columns and _moved(columns, -box.columns[0]),
        ),
    )


def _joined(
    found: Sequence[tuple[tuple[int, ...], TransferOp]],
) -> Iterator[tuple[tuple[int, ...], TransferOp]]:
    current: tuple[tuple[int, ...], TransferOp] | None = None
    for holders, rectangle in found:
        if current is not None and current[0] == holders and (both := _stacked(current[1], rectangle)) is not None:
            current = (holders, both)
            continue
        if current is not None:
            yield current
        current = (holders, rectangle)
    if current is not None:
        yield current


def _stacked(above: TransferOp, below: TransferOp) -> TransferOp | None:
    """The two as one, where `below` follows `above` on both sides."""
    pairs = ((above.source_box, below.source_box), (above.target_box, below.target_box))
    if above.source != below.source or any(a.columns != b.columns or a.rows[1] != b.rows[0] for a, b in pairs):
        return None
    source, target = (Box((a.rows[0], b.rows[1]), a.columns) for a, b in pairs)
    return replace(above, source_box=source, target_box=target)


def _assigned(
    holders: Sequence[int], items: Sequence[tuple[ServerRank, TransferOp]]
) -> Iterator[tuple[int, ServerRank, TransferOp]]:
    """Runs of equal length, one a holder: few connections, and no holder a row more than another."""
    total = sum(rectangle.num_elements for _, rectangle in items)
    share = -(-total // len(holders))
    done = 0
    for receiver, rectangle in items:
        rest: TransferOp | None = rectangle
        while rest is not None:
            index = min(done // share, len(holders) - 1)
            head, rest = _cut(rest, (index + 1) * share - done)
            done += head.num_elements
            yield holders[index], receiver, head


def _cut(rectangle: TransferOp, num_elements: int) -> tuple[TransferOp, TransferOp | None]:
    """The first rows, those that begin within `num_elements`, and the others if there are any."""
    num_rows = rectangle.source_box.shape[0]
    width = rectangle.num_elements // num_rows
    head_rows = -(-num_elements // width)
    if head_rows >= num_rows:
        return rectangle, None
    return _rows(rectangle, 0, head_rows), _rows(rectangle, head_rows, num_rows)


def _rows(rectangle: TransferOp, start: int, stop: int) -> TransferOp:
    def within(box: Box) -> Box:
        return Box((box.rows[0] + start, box.rows[0] + stop), box.columns)

    return replace(rectangle, source_box=within(rectangle.source_box), target_box=within(rectangle.target_box))


def buckets(rectangles: Sequence[TransferOp], num_elements: int) -> Iterator[tuple[TransferOp, ...]]:
    """Rectangles in runs of at most `num_elements`, larger ones cut by rows (a row is never cut)."""
    bucket: list[TransferOp] = []
    room = num_elements
    for rectangle in rectangles:
        rest: TransferOp | None = rectangle
        while rest is not None:
            width = rest.num_elements // rest.source_box.shape[0]
            if room < width and bucket:
                yield tuple(bucket)
                bucket, room = [], num_elements
            head, rest = _cut(rest, max(room // width, 1) * width)
            bucket.append(head)
            room -= head.num_elements
    if bucket:
        yield tuple(bucket)


def balance(plan: ReshardingPlan, trainer: TrainerLayout) -> tuple[int, int]:
    """(elements of the busiest sender, the mean of the busiest pipeline stage).

    A stage's weights are on its own ranks only, so no plan has a busiest sender below that mean.
    """
    totals = plan.elements_by_sender
    per_stage = trainer.num_ranks // trainer.model.pipeline
    stages = [totals[start : start + per_stage] for start in range(0, len(totals), per_stage)]
    return max(totals), max(-(-sum(stage) // per_stage) for stage in stages)


def _moved(interval: Interval, by: int) -> Interval:
    return interval[0] + by, interval[1] + by
