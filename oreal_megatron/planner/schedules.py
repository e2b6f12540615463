"""Seconds of a step under each `rollout.schedule`, by simulation: servers that share their time among responses.

A closed formula lacks what decides between the schedules: how long a server waits for the longest responses, and how
much of that wait other steps' responses fill. A token takes longer the more responses a server has, and the longer
these are by then, so long responses count for more than in a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

_MEASURED_STEPS = 24
"""Steps that are measured at least."""
_FIRST_STEPS = 8
"""Steps before those that are measured, and twice the bound more: they fill the servers, which begin empty."""
_LENGTH_STEPS = 8
"""Lengths of responses, between which a token's time is linear."""
LENGTH_SIGMA = 0.6
"""Standard deviation of the logarithm of response lengths, where none were measured. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Servers, responses and trainer of a step."""

    num_servers: int
    places: int
    """Responses that a server generates at once at most."""
    token_seconds: Callable[[float, float], float]
    """Seconds of a token of each response, by the number of responses at once on a server and the mean tokens of these
    so far, prompts included."""
    prefill_token_seconds: float
    """Seconds in which a server reads a token of a prompt, or of a response that it goes on with."""
    request_seconds: float = 0.0
    """Seconds that a request takes a server besides its tokens."""
    prompt_tokens: float
    samples_per_prompt: int
    responses: int
    """Responses of a step."""
    lengths: Sequence[int]
    """Tokens of responses, from which every response draws its own."""
    as_listed: bool = False
    """Whether the responses of every step have exactly `lengths`, in this order."""
    train_seconds: float = 0.0
    """Seconds between a step's last response and the publication."""
    publish_seconds: float = 0.0
    keep_cache: bool = False
    """Whether responses go on after a publication without being read again; they count as of the weights that began
    them."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Steps of a schedule."""

    schedule: str
    max_staleness: int
    keep_cache: bool
    step_seconds: float
    """Mean: steps whose batches were generated at the same time end soon after each other, and the next waits."""
    idle_share: float
    """Share of the servers' time in which a server has no response to generate."""
    mean_staleness: float
    """Updates between the weights that generated a token and those that train on it, mean over tokens."""


def lognormal_lengths(mean: float, limit: int, count: int) -> list[int]:
    """Returns quantiles of a log-normal distribution that is cut off at `limit` and has the mean `mean`."""
    normal = np.sort(np.random.default_rng(0).standard_normal(count))

    def lengths(location: float) -> NDArray[np.float64]:
        return np.minimum(np.exp(location + LENGTH_SIGMA * normal), limit)

    low, high = log(1e-3), log(limit) + 8 * LENGTH_SIGMA
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    return [max(round(length), 1) for length in lengths(low)]


def generation_seconds(setting: Setting) -> float:
    """Returns the seconds in which servers that have nothing else to do generate the responses of a step."""
    servers = _Servers(_with_used_places(setting, batches=1))
    servers.admit(0, _drawn(setting, np.random.default_rng(0)))
    servers.begin(version=0)
    servers.run(until=lambda: servers.is_complete(0))
    return servers.now


def _with_used_places(setting: Setting, *, batches: int) -> Setting:
    """Returns the setting without places that the responses of some batches never fill."""
    return replace(setting, places=min(setting.places, batches * setting.responses))


def _drawn(setting: Setting, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.array(setting.lengths) if setting.as_listed else rng.choice(setting.lengths, setting.responses)


def simulate(setting: Setting, schedule: str, max_staleness: int, *, seed: int = 0) -> Simulated:
    """Simulates steps of a schedule as `rollout/ahead.py` has them, in the middle of a long run.

    At step s the servers have the batches of steps s to s + max_staleness, the oldest first. A step trains once its
    batch is complete. Generation stands still during a publication, and what is unfinished is read again after it
    unless its KV cache is kept; under one_ahead the next step's batch is complete before.
    """
    servers = _Servers(_with_used_places(setting, batches=max_staleness + 1))
    rng = np.random.default_rng(seed)
    staleness: list[float] = []
    idle_from = time_from = 0.0
    period = max_staleness + 1  # of steps that end soon after each other, and others that wait
    measured = period * ceil(_MEASURED_STEPS / period)
    admitted, first = 0, _FIRST_STEPS + 2 * max_staleness
    for step in range(first + measured):
        if step == first:
            idle_from, time_from = servers.idle_seconds, servers.now
        while admitted <= step + max_staleness:
            servers.admit(admitted, _drawn(setting, rng))
            admitted += 1
        servers.begin(version=step)
        servers.run(until=lambda: servers.is_complete(step))  # noqa: B023 (called before the next step)
        staleness.append(servers.staleness(step))
        servers.run(seconds=setting.train_seconds)
        if schedule == "one_ahead":
            servers.run(until=lambda: servers.is_complete(admitted - 1))  # noqa: B023
        servers.pause(setting.publish_seconds)
    spent = (servers.now - time_from) * setting.num_servers
    return Simulated(
        schedule=schedule,
        max_staleness=max_staleness,
        keep_cache=setting.keep_cache,
        step_seconds=(servers.now - time_from) / measured,
        idle_share=(servers.idle_seconds - idle_from) / spent,
        mean_staleness=float(np.mean(staleness[first:])),
    )


@dataclass
class _Servers:
    """Servers in simulated time; every array has an entry for each response that was admitted."""

    setting: Setting
    now: float = 0.0
    idle_seconds: float = 0.0
    """Sum over servers."""
    step: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    length: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    left: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Tokens that are still to be generated."""
    age: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Sum over tokens of (step of the response - version that generated the token)."""
    began: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Version that began the response; -1 before its first token."""
    server: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Server of the response; -1 while it waits for a place, and after its end."""
    reading: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Seconds that each server still reads prompts and begun responses."""
    version: int = 0

    def __post_init__(self) -> None:
        setting = self.setting
        self.length_step = max(setting.lengths) / _LENGTH_STEPS
        lengths = setting.prompt_tokens + self.length_step * np.arange(_LENGTH_STEPS + 1)
        # By the number of responses at once, and their mean length. Nothing takes the time of no response.
        self.token_seconds = np.array(
            [np.zeros(len(lengths))]
            + [[setting.token_seconds(float(n), length) for length in lengths] for n in range(1, setting.places + 1)]
        )
        if setting.as_listed and len(setting.lengths) != setting.responses:
            raise ValueError(f"{len(setting.lengths)} lengths are listed for {setting.responses} responses")
        if not (self.token_seconds[1:] > 0).all():
            raise ValueError("token_seconds is not positive for every number and length of responses")

    def admit(self, step: int, lengths: NDArray[np.int64]) -> None:
        """Adds the batch of a step."""
        count = len(lengths)
        self.step = np.append(self.step, np.full(count, step))
        self.length = np.append(self.length, lengths.astype(float))
        self.left = np.append(self.left, lengths.astype(float))
        self.age = np.append(self.age, np.zeros(count))
        self.began = np.append(self.began, np.full(count, -1))
        self.server = np.append(self.server, np.full(count, -1))

    def begin(self, *, version: int) -> None:
        """Begins generation with the weights of a version."""
        self.version = version
        self.reading = np.zeros(self.setting.num_servers)
        self._fill(np.zeros(self.setting.num_servers, np.int64))

    def pause(self, seconds: float) -> None:
        """Ends generation for a publication. Responses that are finished and trained are forgotten."""
        self.now += seconds
        self.idle_seconds += seconds * self.setting.num_servers
        kept = (self.left > 0) | (self.step > self.version)
        for name in ("step", "length", "left", "age", "began", "server"):
            setattr(self, name, getattr(self, name)[kept])
        self.server[:] = -1

    def is_complete(self, step: int) -> bool:
        """Returns whether every response of steps up to `step` is finished."""
        return not (self.left[self.step <= step] > 0).any()

    def staleness(self, step: int) -> float:
        """Returns the mean age of a step's tokens."""
        mine = self.step == step
        return float(self.age[mine].sum() / self.length[mine].sum())

    def run(self, *, seconds: float = float("inf"), until: Callable[[], bool] = lambda: False) -> None:
        """Generates for some seconds, or until a condition holds, which an end of a response makes true."""
        end = self.now + seconds
        while self.now < end and not until():
            active = np.flatnonzero(self.server >= 0)
            of = self.server[active]
            counts = np.bincount(of, minlength=self.setting.num_servers)
            if not len(active):
                self._pass(end - self.now, counts)
                return
            left = self.left[active]
            so_far = np.bincount(of, self.length[active] - left, minlength=len(counts)) / np.maximum(counts, 1)
            token = self._seconds_of_token(counts, so_far)
            passed = min(float((self.reading[of] + left * token[of]).min()), end - self.now)
            # Responses grow on the way: a token takes the time that it takes halfway.
            halfway = np.maximum(passed - self.reading, 0.0) / np.where(counts, token, np.inf) / 2
            token = self._seconds_of_token(counts, so_far + halfway)
            ahead = self.reading[of] + left * token[of]
            passed = min(float(ahead.min()), end - self.now)
            generated = np.maximum(passed - self.reading[of], 0.0) / token[of]
            ends = ahead <= passed * (1 + 1e-12)
            generated[ends] = self.left[active[ends]]
            self.left[active] -= generated
            version = self.began[active] if self.setting.keep_cache else self.version
            self.age[active] += generated * (self.step[active] - version)
            self._pass(passed, counts)
            self.reading = np.maximum(self.reading - passed, 0.0)
            self.server[active[ends]] = -1
            self._fill(np.bincount(self.server[active[~ends]], minlength=self.setting.num_servers))

    def _seconds_of_token(self, counts: NDArray[np.int64], so_far: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the seconds of a token at each server. so_far: mean tokens of its responses, without prompts."""
        place = so_far / self.length_step
        lower = np.minimum(place.astype(int), _LENGTH_STEPS - 1)
        below, above = self.token_seconds[counts, lower], self.token_seconds[counts, lower + 1]
        seconds: NDArray[np.float64] = below + (place - lower) * (above - below)
        return seconds

    def _pass(self, seconds: float, counts: NDArray[np.int64]) -> None:
        self.now += seconds
        self.idle_seconds += seconds * int((counts == 0).sum())

    def _fill(self, counts: NDArray[np.int64]) -> None:
        """Gives waiting responses to the servers with the fewest, the oldest step first. counts: those of each."""
        setting = self.setting
        room = int((setting.places - counts).sum())
        # Responses are in the order of their steps, as they were admitted.
        for index in np.flatnonzero((self.server < 0) & (self.left > 0))[:room] if room else ():
            server = int(counts.argmin())
            self.server[index] = server
            counts[server] += 1
            begun = self.length[index] - self.left[index]
            if not begun:
                self.began[index] = self.version
                tokens = setting.prompt_tokens / setting.samples_per_prompt
                self.reading[server] += setting.request_seconds + tokens * setting.prefill_token_seconds
            elif not setting.keep_cache:  # of the same request, which stayed at its server
                self.reading[server] += (setting.prompt_tokens + begun) * setting.prefill_token_seconds
