"""The prompt stream: endless, shuffled every epoch, and resumable to the exact prompt."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from oreal_megatron.data.difficulty import BANDS, UNKNOWN, band_of
from oreal_megatron.data.prompts import fingerprint
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import GradedRollout, Prompt, decided

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Pool:
    """Prompts that are shuffled together, and the position in them."""

    name: str
    """Name of the source; empty where all prompts are one pool."""
    share: float
    """Share of the drawn prompts that come from this pool, in (0, 1]."""
    epoch: int = 0
    offset: int = 0
    num_drawn: int = 0
    """Prompts drawn from the pool in all epochs."""
    pass_rates: dict[str, float] = field(default_factory=dict)
    """Re-estimated pass rates by which the epoch is balanced."""
    ids: list[str] = field(default_factory=list)
    """Ids of the prompts of the epoch, in which an id may occur several times."""
    order: list[int] = field(default_factory=list)
    """Order of `ids` in the epoch."""


class PromptStream:
    """Stream over a balanced list of prompts, in which a prompt may occur several times per epoch."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        prompts_per_step: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        rollout_weight: float = 0.0,
        balance: Callable[[Sequence[Prompt]], list[Prompt]] = list,
    ):
        """Starts the stream. Logs a warning where steps without repetitions cannot keep the balance of the list.

        prompts: the list, balanced by the pass rates of its prompts. weights: part of the draws by source; None: all
        prompts are drawn alike. rollout_weight: weight of a step's responses in the pass rates that `observe`
        re-estimates, in [0, 1]; 0: they stay. balance: repeats and drops prompts by their pass rates, once an epoch.

        Raises:
            ValueError: a step asks for more different prompts than there are, or a source has no prompts.
        """
        self._prompts = list(prompts)
        self._by_id = {prompt.id: prompt for prompt in prompts}
        self._data = fingerprint(self._prompts)
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._rollout_weight, self._balance = rollout_weight, balance
        self._pass_rates: dict[str, float] = {}
        """Re-estimated pass rates."""
        self._response_tokens: dict[str, float] = {}
        """Mean tokens of the responses of a prompt's last group, by id."""
        if len(self._by_id) < prompts_per_step:
            raise ValueError(
                f"a step asks for {prompts_per_step} prompts (data.prompts_per_step, times "
                f"rollout.long_tail.oversample), but only {len(self._by_id)} different prompts are left "
                "after difficulty balancing (which drops prompts without a pass rate); lower data.prompts_per_step, "
                "estimate pass rates with data.pass_rate, widen data.difficulty_balance, or give more prompts"
            )
        self._pools = [
            self._pool(name, weight / sum((weights or {"": 1.0}).values()))
            for name, weight in (weights or {"": 1.0}).items()
        ]
        self._put_off: list[str] = []

    def draw(self) -> list[Prompt]:
        """Returns the next step's prompts, all different; a repetition within a step is put off to the next step.

        At most an epoch's copies of a prompt are put off. More arise only where the balance cannot be kept.
        """
        drawn: dict[str, None] = {}
        waiting, self._put_off = deque(self._put_off), []
        num_put_off = Counter(waiting)
        copies = Counter(id for pool in self._pools for id in pool.ids)
        while len(drawn) < self._prompts_per_step:
            if waiting:
                id = waiting.popleft()
                num_put_off[id] -= 1
            else:
                id = self._next()
            if id not in drawn:
                drawn[id] = None
            elif num_put_off[id] < copies[id]:
                self._put_off.append(id)
                num_put_off[id] += 1
        self._put_off += waiting
        return [self._rated(id, self._pass_rates) for id in drawn]

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Puts prompts of the last draw back, which come first in the next draw."""
        self._put_off = [*(prompt.id for prompt in prompts), *self._put_off]

    def observe(self, groups: Sequence[Sequence[GradedRollout]]) -> None:
        """Notes how long the groups' responses are, and re-estimates the pass rates of their prompts.

        Pass rates are those of decided responses; the next epoch takes them.
        """
        for group in groups:
            lengths = [graded.rollout.num_response_tokens for graded in group]
            self._response_tokens[group[0].rollout.prompt.id] = sum(lengths) / len(lengths)
        for group in groups if self._rollout_weight else ():
            outcomes = [graded.is_correct for graded in decided(group)]
            if outcomes:
                id = group[0].rollout.prompt.id
                earlier = self._pass_rates.get(id, self._by_id[id].pass_rate)
                weight = 1.0 if earlier is None else self._rollout_weight
                rate = sum(outcomes) / len(outcomes)
                self._pass_rates[id] = weight * rate + (1.0 - weight) * (earlier or 0.0)

    def state_dict(self, waiting: Sequence[Prompt] = ()) -> dict[str, Any]:
        """Returns the position in the stream, what `observe` has noted, and the fingerprint of its prompts.

        waiting: prompts of the last draws that wait for their step, in the order of the draws; a stream with this state
        draws them again, the same for each step.
        """
        return {
            "pools": {
                pool.name: {
                    "epoch": pool.epoch,
                    "offset": pool.offset,
                    "num_drawn": pool.num_drawn,
                    "pass_rates": dict(pool.pass_rates),
                }
                for pool in self._pools
            },
            "pass_rates": dict(self._pass_rates),
            "response_tokens": dict(self._response_tokens),
            "put_off": [*(prompt.id for prompt in waiting), *self._put_off],
            "num_prompts": len(self._prompts),
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the position of a `state_dict`. Raises ValueError where it is of other data."""
        if state["data"] != self._data:
            raise ValueError(
                f"the checkpoint's prompt stream is of other data ({state['num_prompts']} prompts with fingerprint "
                f"{state['data']}) than data.train with its balancing gives now ({len(self._prompts)}, {self._data}); "
                "resume with the data of the run, or start in another run.dir"
            )
        # Version 0.1.0 had one pool, and its position at the top.
        positions = state.get("pools") or {"": {"epoch": state["epoch"], "offset": state["offset"]}}
        for pool in self._pools:
            position = positions[pool.name]
            pool.epoch, pool.offset = position["epoch"], position["offset"]
            pool.num_drawn = position.get("num_drawn", 0)
            pool.pass_rates = dict(position.get("pass_rates", {}))
            self._start_epoch(pool)
        self._pass_rates = dict(state.get("pass_rates", {}))
        self._response_tokens = dict(state.get("response_tokens", {}))
        self._put_off = list(state["put_off"])

    def _pool(self, name: str, share: float) -> _Pool:
        """Makes the pool of a source. Logs a warning where some prompts would have to be in a step more than once."""
        pool = _Pool(name=name, share=share)
        self._start_epoch(pool)
        if not pool.ids:
            raise ValueError(
                f"data.train.{name}: no prompts are left after difficulty balancing (which drops prompts without a "
                "pass rate); widen data.difficulty_balance, or leave the source out"
            )
        most = max(Counter(pool.ids).values())
        largest = int(len(pool.ids) / (most * share))
        if self._prompts_per_step > largest:
            logger.warning(
                "%s cannot be kept: a prompt with %d of the %d entries should be in a step of %d "
                "prompts %.1f times, and is in it once at most, so other prompts come more often than they should. "
                "Give more prompts, widen data.difficulty_balance, or lower data.prompts_per_step x "
                "rollout.long_tail.oversample to at most %d",
                f"data.train.{name}.weight" if name else "data.difficulty_balance",
                most,
                len(pool.ids),
                self._prompts_per_step,
                self._prompts_per_step * share * most / len(pool.ids),
                largest,
            )
        return pool

    def _next(self) -> str:
        """Returns the next id, from the pool that is the furthest behind its share of all draws."""
        total = sum(pool.num_drawn for pool in self._pools) + 1
        pool = max(self._pools, key=lambda pool: pool.share * total - pool.num_drawn)
        if pool.offset == len(pool.order):
            pool.epoch, pool.offset = pool.epoch + 1, 0
            self._rebalance(pool)
            self._start_epoch(pool)
        pool.offset, pool.num_drawn = pool.offset + 1, pool.num_drawn + 1
        return pool.ids[pool.order[pool.offset - 1]]

    def _rebalance(self, pool: _Pool) -> None:
        """Has the next epoch balanced by the pass rates of now, unless the pool would have too few prompts for a step.

        With fewer different prompts than its share of a step, the other pools would fill the steps, against the
        weights.
        """
        new = set(self._balanced(pool.name, self._pass_rates))
        share = math.ceil(round(self._prompts_per_step * pool.share, 9))
        others = {id for other in self._pools if other is not pool for id in other.ids}
        needed = max(share, self._prompts_per_step - len(others))
        if len(new) >= needed:
            pool.pass_rates = dict(self._pass_rates)
            return
        own = [self._rated(id, self._pass_rates) for id in self._by_id if self._is_of(pool.name, id)]
        counts = Counter(band_of(prompt.pass_rate) for prompt in own)
        logger.warning(
            "%s: epoch %d has the balance of the one before it: by the pass rates of now, data.difficulty_balance "
            "leaves %d different prompts, and a step needs %d. Prompts by pass rate: %s. Give harder prompts, widen "
            "data.difficulty_balance, or lower data.prompts_per_step",
            f"data.train.{pool.name}" if pool.name else "data.train",
            pool.epoch,
            len(new),
            needed,
            ", ".join(f"{band}: {counts[band]}" for band in (*BANDS, UNKNOWN) if counts[band]),
        )

    def _start_epoch(self, pool: _Pool) -> None:
        """Sets the ids and the order of the pool's epoch."""
        pool.ids = self._balanced(pool.name, pool.pass_rates)
        pool.order = list(range(len(pool.ids)))
        random.Random(derive_seed(self._seed, "stream", *filter(None, [pool.name]), pool.epoch)).shuffle(pool.order)

    def _balanced(self, name: str, pass_rates: Mapping[str, float]) -> list[str]:
        """Returns the ids of a pool's epoch. name: see `_Pool`. pass_rates: re-estimated ones."""
        if not pass_rates:
            return [prompt.id for prompt in self._prompts if self._is_of(name, prompt.id)]
        own = [self._rated(id, pass_rates) for id in self._by_id if self._is_of(name, id)]
        return [prompt.id for prompt in self._balance(own)]

    def _is_of(self, name: str, id: str) -> bool:
        """Returns whether a prompt is of the pool of this name."""
        return name in ("", self._by_id[id].source)

    def _rated(self, id: str, pass_rates: Mapping[str, float]) -> Prompt:
        prompt = self._by_id[id]
        if id in pass_rates:
            prompt = replace(prompt, pass_rate=pass_rates[id])
        if id in self._response_tokens:
            prompt = replace(prompt, response_tokens=self._response_tokens[id])
        return prompt
