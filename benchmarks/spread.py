"""Spread of a step's requests over the servers of the 32B setting, in virtual time: longest first, and work stealing.

    python -m benchmarks.spread [--draws 8]

16 servers, 8 replicas, 1,024 responses to 64 prompts. The pools and routers are those of a run; only the clock and the
servers are simulated. A server takes the planner's seconds for a token of so many responses at once, on H100. Lengths
are log-normal (sigma 0.6) with a mean of about 7,000 and at most 14,000 tokens; half of the variance of their logarithm
is between prompts, half between the responses to a prompt. What is known of a prompt is the mean of 16 earlier
responses. Work stealing moves half of the running responses of the busiest server to a server that has none, which
reads their tokens; it is simulated here alone. `even` is its bound: responses move at no cost whenever two servers
differ by more than one. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

from oreal_megatron.config import SamplingConfig, SGLangConfig
from oreal_megatron.planner.schedules import Setting
from oreal_megatron.servers.client import Generated, ServerDescription, ServerLost
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.server import ServerSettings
from oreal_megatron.types import GenerationRequest

SERVERS, REPLICAS, PROMPTS, SAMPLES, LIMIT = 16, 8, 8, 16, 14_000
"""PROMPTS: of a replica."""
STOP = 7
SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=LIMIT)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer, so that hours of sleep take no time."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@dataclass(order=True)
class _Response:
    """A response under way at a server."""

    end: float
    """Tokens of each response, on the server's count, at which it is complete."""
    number: int
    length: int = field(compare=False)
    done: asyncio.Future[None] = field(compare=False)


class SimulatedClient:
    """A client of a simulated server, whose responses have the length that `lengths` has for a request's seed."""

    def __init__(self, number: int, lengths: Sequence[int], token_seconds: Callable[[int], float]):
        """token_seconds: seconds of a token of each response, by the number of responses at once."""
        self.url = f"http://server-{number}"
        self.is_up = True
        self.num_tokens = 0
        self.prompts: Counter[tuple[int, ...]] = Counter()
        self.most_at_once = 0
        self.first_seconds = math.inf
        """Time of the first request on the clock of the loop."""
        self.finished: Callable[[], None] = lambda: None
        """Called after a response has ended."""
        self._lengths, self._token_seconds = lengths, token_seconds
        self._running: list[_Response] = []
        self._count, self._counted_until = 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def describe(self) -> ServerDescription:
        assert not self.is_up, "the other process has said that the server has the weights"
        await asyncio.sleep(10.0)
        raise ServerLost("no answer to a connection")

    async def is_healthy(self, seconds: float) -> bool:
        return True

    async def generate(
        self, rid: str, prompt_ids: tuple[int, ...], sampling: dict[str, Any], *, cache_key: str | None = None
    ) -> Generated:
        loop = asyncio.get_running_loop()
        self.first_seconds = min(self.first_seconds, loop.time())
        self.prompts[prompt_ids] += 1
        length = self._lengths[sampling["sampling_seed"]]
        done = loop.create_future()
        self._advance()
        self._begin([(length, length, done, sampling["sampling_seed"])])
        self.most_at_once = max(self.most_at_once, self.at_once)
        await done
        self.num_tokens += length
        tokens = (*[10] * (length - 1), STOP)
        finish = {"type": "stop", "matched": STOP}
        return Generated(token_ids=tokens, logprobs=(-1.0,) * length, finish=finish, weight_labels=(("0-run", length),))

    @property
    def at_once(self) -> int:
        return len(self._running)

    def move(self, number: int, to: SimulatedClient, read_token_seconds: float) -> None:
        """Moves the responses with the fewest tokens left to another server, which first reads what they have."""
        self._advance()
        to._advance()
        moved = [heapq.heappop(self._running) for _ in range(number)]
        left = [response.end - self._count for response in moved]
        read = sum(response.length - rest for response, rest in zip(moved, left, strict=True))
        # Nothing is generated while the other server reads.
        to._counted_until += read * read_token_seconds
        to._begin([(rest, r.length, r.done, r.number) for rest, r in zip(left, moved, strict=True)])
        self._set_timer()

    def _begin(self, responses: Sequence[tuple[float, int, asyncio.Future[None], int]]) -> None:
        for left, length, done, number in responses:
            heapq.heappush(self._running, _Response(self._count + left, number, length, done))
        self._set_timer()

    def _advance(self) -> None:
        """Counts the tokens of each response since the last call."""
        now = asyncio.get_running_loop().time()
        if now > self._counted_until:
            if self._running:
                self._count += (now - self._counted_until) / self._token_seconds(self.at_once)
            self._counted_until = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            seconds = max(self._running[0].end - self._count, 0.0) * self._token_seconds(self.at_once)
            self._timer = asyncio.get_running_loop().call_at(self._counted_until + seconds, self._end_next)

    def _end_next(self) -> None:
        self._advance()
        response = heapq.heappop(self._running)
        self._count = max(self._count, response.end)
        response.done.set_result(None)
        self._set_timer()
        self.finished()


def generated_by(
    clients: Sequence[SimulatedClient], config: SGLangConfig, requests: Sequence[Sequence[GenerationRequest]]
) -> float:
    """Has a pool a replica generate its requests, all at the same time, and returns the seconds that it took."""
    settings = ServerSettings(config=config, launcher=SimpleNamespace(), check=lambda url, found: None, run="run")  # type: ignore[arg-type]
    done: Counter[int] = Counter()

    async def replica(number: int) -> None:
        pool = ServerPool(settings, stop_token_id=STOP, config_json={}, replica=number, num_replicas=len(requests))
        await pool.follow(0, "0-run", {client.url: client.is_up for client in clients})
        for server, client in zip(pool.servers, clients, strict=True):
            server.client = client  # type: ignore[assignment]
        mine = requests[number]
        await pool.generate(mine, SAMPLING, lambda index, _: done.update([mine[index].seed]))

    async def all_replicas() -> float:
        await asyncio.gather(*(replica(number) for number in range(len(requests))))
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        seconds = runner.run(all_replicas())
    assert done == Counter(request.seed for mine in requests for request in mine)
    return seconds


def drawn(seed: int) -> tuple[list[int], list[float]]:
    """Returns the lengths of all responses in the order of their prompts, and the known mean length of every prompt."""
    rng = random.Random(seed)
    sigma = 0.6 / math.sqrt(2)
    lengths, known = [], []
    for _ in range(REPLICAS * PROMPTS):
        # The median whose mean, cut off at the limit, is about 7,000.
        location = math.log(6_300) + rng.gauss(0, sigma)
        both = [min(int(math.exp(location + rng.gauss(0, sigma))) + 1, LIMIT) for _ in range(2 * SAMPLES)]
        lengths += both[:SAMPLES]
        known.append(mean(both[SAMPLES:]))
    return lengths, known


def typical_token_seconds(setting: Setting) -> Callable[[int], float]:
    """Returns the seconds of a token by the number of responses at once, each of which has half of the mean length."""
    length = setting.prompt_tokens + mean(setting.lengths) / 2
    return lambda at_once: setting.token_seconds(at_once, length)


def step_seconds(setting: Setting, config: SGLangConfig, seed: int, *, longest_first: bool, stealing: str) -> float:
    """Returns the seconds of generation of a draw of lengths. stealing: no, dry or even."""
    lengths, known = drawn(seed)
    clients = [SimulatedClient(number, lengths, typical_token_seconds(setting)) for number in range(SERVERS)]
    left = len(lengths)

    def finished() -> None:
        nonlocal left
        left -= 1
        at_once = {client: client.at_once for client in clients}
        if sum(at_once.values()) < left:
            return  # requests that wait in the trainer fill the places
        if stealing == "dry":
            for idle in [client for client in clients if not client.at_once]:
                busiest = max(clients, key=lambda client: client.at_once)
                busiest.move(busiest.at_once // 2, idle, setting.prefill_token_seconds)
        while stealing == "even":
            least, most = (choose(clients, key=lambda client: client.at_once) for choose in (min, max))
            if most.at_once - least.at_once < 2:
                return
            most.move(1, least, 0.0)

    for client in clients:
        client.finished = finished
    requests = []
    for replica in range(REPLICAS):
        prompts = list(range(replica * PROMPTS, (replica + 1) * PROMPTS))
        if longest_first:
            prompts.sort(key=known.__getitem__, reverse=True)
        requests.append(
            [
                GenerationRequest(
                    prompt_ids=(5, prompt),
                    seed=prompt * SAMPLES + sample,
                    max_new_tokens=LIMIT,
                    expected_tokens=known[prompt] if longest_first else None,
                )
                for prompt in prompts
                for sample in range(SAMPLES)
            ]
        )
    return generated_by(clients, config, requests)


def _planned() -> tuple[Setting, SGLangConfig]:
    """Returns the setting and servers of oreal_32b_disaggregated with 16 servers of four H100 each."""
    from rich.console import Console

    from oreal_megatron.cli.planning import planned_config, planner_of

    overrides = [
        "experiment=oreal_32b_disaggregated",
        f"rollout.sglang.num_servers={SERVERS}",
        "rollout.sglang.tensor=4",
    ]
    config = planned_config(overrides, Console(quiet=True), config_dir=None)
    assert config.rollout.sglang is not None
    return planner_of(config)(config).setting(), config.rollout.sglang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=8, help="draws of the lengths")
    draws = range(parser.parse_args().draws)
    setting, servers = _planned()
    one, many = (typical_token_seconds(setting)(at_once) * 1e3 for at_once in (1, 64))
    print(f"{one:.1f} ms a token of one response, {many:.1f} of 64\n")
    print("| `max_concurrency` | order | stealing | seconds, median | worst draw | over today's, median |")
    print("|---|---|---|---|---|---|")
    for most in (16, 32, 64, 256):
        config = servers.model_copy(update={"max_concurrency": most, "urls": [], "health_seconds": 1e6})
        today: list[float] = []
        for longest_first, stealing in ((False, "no"), (True, "no"), (True, "dry"), (True, "even")):
            seconds = [
                step_seconds(setting, config, seed, longest_first=longest_first, stealing=stealing) for seed in draws
            ]
            today = today or seconds
            ratio = median(one / first for one, first in zip(seconds, today, strict=True))
            order = "longest first" if longest_first else "as drawn"
            print(f"| {most} | {order} | {stealing} | {median(seconds):.0f} | {max(seconds):.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
