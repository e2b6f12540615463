"""The prompt stream: endless, shuffled every epoch, and resumable to the exact prompt."""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from oreal_megatron.data.prompts import fingerprint
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import Prompt

logger = logging.getLogger(__name__)


class PromptStream:
    """Stream over a balanced list of prompts, in which a prompt may occur several times per epoch."""

    def __init__(self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int):
        """Starts the stream. Logs a warning where steps without repetitions cannot keep the balance of the list.

        Raises:
            ValueError: a step asks for more different prompts than there are.
        """
        self._prompts = list(prompts)
        self._by_id = {prompt.id: prompt for prompt in prompts}
        self._data = fingerprint(self._prompts)
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        if len(self._by_id) < prompts_per_step:
            raise ValueError(
                f"a step asks for {prompts_per_step} prompts (data.prompts_per_step, times "
                f"rollout.long_tail.oversample), but only {len(self._by_id)} different prompts are left "
                "after difficulty balancing (which drops prompts without a pass rate); lower data.prompts_per_step, "
                "estimate pass rates with data.pass_rate, widen data.difficulty_balance, or give more prompts"
            )
        self._copies = Counter(prompt.id for prompt in prompts)
        self._warn_of_balance()
        self._epoch = 0
        self._offset = 0
        self._put_off: list[Prompt] = []
        self._order = self._shuffled()

    def draw(self) -> list[Prompt]:
        """Returns the next step's prompts, all different; a repetition within a step is put off to the next step.

        At most an epoch's copies of a prompt are put off. More arise only where the balance cannot be kept.
        """
        drawn: dict[str, Prompt] = {}
        waiting, self._put_off = deque(self._put_off), []
        num_put_off = Counter(prompt.id for prompt in waiting)
        while len(drawn) < self._prompts_per_step:
            if waiting:
                prompt = waiting.popleft()
                num_put_off[prompt.id] -= 1
            else:
                prompt = self._next()
            if prompt.id not in drawn:
                drawn[prompt.id] = prompt
            elif num_put_off[prompt.id] < self._copies[prompt.id]:
                self._put_off.append(prompt)
                num_put_off[prompt.id] += 1
        self._put_off += waiting
        return list(drawn.values())

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Puts prompts of the last draw back, which come first in the next draw."""
        self._put_off = [*prompts, *self._put_off]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, and the fingerprint of its prompts."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "put_off": [prompt.id for prompt in self._put_off],
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
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._put_off = [self._by_id[id] for id in state["put_off"]]
        self._order = self._shuffled()

    def _warn_of_balance(self) -> None:
        """Logs a warning where some prompts would have to occur more than once in a step."""
        most = max(self._copies.values(), default=1)
        largest = len(self._prompts) // most
        if self._prompts_per_step > largest:
            logger.warning(
                "data.difficulty_balance cannot be kept: a prompt with %d of the %d entries should be in a step of %d "
                "prompts %.1f times, and is in it once at most, so other prompts come more often than they should. "
                "Give more prompts, widen data.difficulty_balance, or lower data.prompts_per_step x "
                "rollout.long_tail.oversample to at most %d",
                most,
                len(self._prompts),
                self._prompts_per_step,
                self._prompts_per_step * most / len(self._prompts),
                largest,
            )

    def _next(self) -> Prompt:
        if self._offset == len(self._order):
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._shuffled()
        self._offset += 1
        return self._prompts[self._order[self._offset - 1]]

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(derive_seed(self._seed, "stream", self._epoch)).shuffle(order)
        return order
