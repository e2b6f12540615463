"""Schedules of generation and training compared: one trainer and one SGLang server, a core each, run after run.

    python -m benchmarks.async_schedules [--steps 15] [--rounds 1] [--lengths even tail]

Responses have a fixed length: nothing stops them. A step has 128. With the planted tail it has 32, of which one is ten
times as long: with 32 the time of a token depends less on their number, which is closer to a GPU. The objective trains
on every response, with a learning rate that changes next to nothing.

Prints a Markdown table of steps in the middle of a run, which has `max_staleness` + 1 more at either end: the first,
for which nothing was generated ahead, and the last, beside which nothing is left to generate. Work may repeat every
`max_staleness` + 1 steps, so the measured ones are the next multiple of that from `--steps` on. Its columns are trained
response tokens a second, their ratio to `in_turn`, the share of the time in which the server had no request, and the
mean and largest age of the trained tokens in updates. A short run before the others warms the server up.

The last column is what the planner's simulation makes of the times of the two runs in turn, and of how the time of a
token depends on the number of responses at once and on their lengths, and what a request takes besides, which are
measured after the runs: tokens a second by simulation, over those measured.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.plain_run import PLAIN_RUN
from oreal_megatron.metrics import read_metrics
from oreal_megatron.planner.schedules import Setting, generation_seconds, simulate

Arm = tuple[str, int, str]

TRAINER_CORE, SERVER_CORE = 0, 1
FIRST = "warm_up"
TAIL_OF, TAIL_TIMES = 32, 10
ARMS: dict[str, list[Arm]] = {
    "even": [
        ("in_turn", 0, "recompute"),
        ("one_ahead", 1, "recompute"),
        ("continuous", 1, "recompute"),
        ("continuous", 1, "keep_cache"),
        ("continuous", 2, "keep_cache"),
    ],
    "tail": [
        ("in_turn", 0, "recompute"),
        ("one_ahead", 1, "recompute"),
        ("continuous", 2, "recompute"),
        ("continuous", 2, "keep_cache"),
        ("continuous", 4, "keep_cache"),
        ("continuous", 8, "keep_cache"),
        ("continuous", 16, "keep_cache"),
    ],
}
"""Lengths of responses -> rollout.schedule, rollout.max_staleness and rollout.in_flight of runs."""
IN_TURN = ("in_turn", 0, "recompute")
READ_PROMPTS, READ_TOKENS = 32, 256
PROMPT_TOKENS = 16
"""Tokens of a prompt where the server is timed and simulated: about those of the task."""


@dataclass(frozen=True)
class Size:
    """Size of a step and its model, with which generation and training take about as long."""

    prompts: int
    hidden: int


SIZES = {"even": Size(prompts=16, hidden=320), "tail": Size(prompts=4, hidden=448)}
PLACES = 2
"""Steps whose responses the server generates at once at most."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures of the steps in the middle of a run."""

    tokens: float
    """Trained response tokens."""
    seconds: float
    num_steps: int
    generate_seconds: float
    """Median of a step, as those that follow."""
    publish_seconds: float
    other_seconds: float
    idle_seconds: float
    ages: Sequence[float]
    """Mean age of a step's tokens, in updates."""
    oldest: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def num_responses(arguments: argparse.Namespace, lengths: str) -> int:
    """Returns the responses of a step."""
    count: int = SIZES[lengths].prompts * arguments.samples
    return count


def settings(arguments: argparse.Namespace, directory: Path, lengths: str) -> list[str]:
    """Overrides that all runs of such lengths share, and their server."""
    longest = TAIL_TIMES * arguments.tokens
    return [
        "experiment=arithmetic_sglang",
        "objective=reinforce",
        *PLAIN_RUN,
        "sft.steps=1",
        "optimizer.policy={lr: 1.0e-9, min_lr: 1.0e-9}",
        f"data.prompts_per_step={SIZES[lengths].prompts}",
        f"rollout.samples_per_prompt={arguments.samples}",
        f"rollout.sampling={{temperature: 1.0, top_p: 1.0, max_new_tokens: {longest}}}",
        "rollout.mismatch=null",
        "rollout.undecided=null",
        "rollout.sglang.startup_seconds=900.0",
        f"rollout.sglang.max_concurrency={PLACES * num_responses(arguments, lengths)}",
        "rollout.sglang.arguments.max-total-tokens=65536",
        f"model.max_sequence_length={longest + 128}",
        f"model.geometry.hidden_size={SIZES[lengths].hidden}",
        f"model.geometry.ffn_hidden_size={2 * SIZES[lengths].hidden}",
        "run.export=none",
        f"run.dir={directory}",
    ]


def on_core(core: int) -> Callable[[], None]:
    """Binds a child process to one core, where the machine has it."""

    def bind() -> None:
        if core in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {core})

    return bind


def started(command: Sequence[str], core: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=on_core(core),
        )


@contextmanager
def server(arguments: argparse.Namespace, directory: Path, lengths: str) -> Iterator[str]:
    """Runs a server; yields its URL. It takes its config.json from the first run that attaches to it."""
    announced = directory / "urls"
    options = settings(arguments, directory / FIRST, lengths)
    process = started(
        ["oreal_megatron.cli.serve", "--announce", str(announced), *options], SERVER_CORE, directory / "server.log"
    )
    try:
        while not (urls := [path.read_text().strip() for path in announced.glob("*")]):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start: see {directory / 'server.log'}")
            time.sleep(0.5)
        yield urls[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def train(arguments: argparse.Namespace) -> None:
    """Runs a trainer in this process, with responses of the lengths that are asked for."""
    from oreal_megatron.cli.train import main as train_main
    from oreal_megatron.rollout.sampler import Sampler
    from oreal_megatron.servers.request_queue import RequestQueue

    call, options = Sampler.call, RequestQueue.options

    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = call(self, *args, **kwargs)
        lengths = lengths_of(len(made.requests), arguments.tokens, with_tail=arguments.lengths == ["tail"])
        made.requests = [
            replace(request, max_new_tokens=length) for request, length in zip(made.requests, lengths, strict=True)
        ]
        return made

    def endless(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**options(self, *args, **kwargs), "stop_token_ids": [], "ignore_eos": True}

    Sampler.call, RequestQueue.options = planted, endless  # type: ignore[method-assign]
    sys.argv = ["oreal-train", *arguments.overrides]
    train_main()


def lengths_of(num_responses: int, tokens: int, *, with_tail: bool) -> list[int]:
    """Returns the tokens of a step's responses."""
    return [
        tokens * (TAIL_TIMES if with_tail and index % TAIL_OF == TAIL_OF - 1 else 1) for index in range(num_responses)
    ]


def num_steps(max_staleness: int, arguments: argparse.Namespace) -> int:
    """Returns the steps of a run: those that are measured, and `max_staleness` + 1 at either end."""
    period = max_staleness + 1
    return period * (math.ceil(arguments.steps / period) + 2)


def measured(directory: Path, max_staleness: int) -> Measures:
    """Returns the measures of a run, without its first and last `max_staleness` + 1 steps."""
    steps = read_metrics(directory)[0][max_staleness + 1 : -max_staleness - 1]
    metrics, seconds = [record["metrics"] for record in steps], [record["seconds"] for record in steps]
    idle = [
        m.get("rollout/server_idle_share", 1 - s["generate"] / s["total"]) * s["total"]
        for m, s in zip(metrics, seconds, strict=True)
    ]
    return Measures(
        tokens=sum(m["rollout/responses"] * m["rollout/response_tokens"] for m in metrics),
        seconds=sum(s["total"] for s in seconds),
        num_steps=len(steps),
        generate_seconds=statistics.median(s["generate"] for s in seconds),
        publish_seconds=statistics.median(s["publish"] for s in seconds),
        other_seconds=statistics.median(s["total"] - s["generate"] - s["publish"] for s in seconds),
        idle_seconds=sum(idle),
        ages=[m.get("rollout/mean_updates", 0.0) for m in metrics],
        oldest=max(m.get("rollout/oldest_updates", 0.0) for m in metrics),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="that are measured in each run at least")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every schedule, in turns")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of a response that is not in the tail")
    parser.add_argument("--directory", type=Path, help="for the runs, which are kept; none: a temporary one")
    parser.add_argument("--lengths", choices=sorted(ARMS), nargs="+", help="default: all")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # a trainer's process
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, least in (("steps", 1), ("rounds", 1), ("samples", 1), ("tokens", 2)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name} = {value}; set it to at least {least}")
    if num_responses(arguments, "tail") % TAIL_OF:
        needed = TAIL_OF // SIZES["tail"].prompts
        parser.error(
            f"--samples = {arguments.samples}: one of {TAIL_OF} responses is long, so make it a multiple of {needed}"
        )
    if arguments.train:
        train(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        found: dict[tuple[str, Arm], list[Measures]] = {}
        times = {}
        for lengths in arguments.lengths or ARMS:
            own = directory / lengths
            own.mkdir(exist_ok=True)
            with server(arguments, own, lengths) as url:
                run(arguments, own / FIRST, url, lengths, IN_TURN, num_steps=1)
                for turn in range(arguments.rounds):
                    for arm in ARMS[lengths]:
                        name = "_".join(map(str, (*arm, turn)))
                        run(arguments, own / name, url, lengths, arm, num_steps=num_steps(arm[1], arguments))
                        found.setdefault((lengths, arm), []).append(measured(own / name, arm[1]))
                # With places of the KV cache as scattered as in the runs.
                times[lengths] = server_times(url, arguments, lengths)
    print_table(found, times, arguments)


@dataclass(frozen=True, kw_only=True)
class ServerTimes:
    """Times of the server."""

    read_seconds: float
    """Of a token of a prompt."""
    request_seconds: float
    """Of a request besides its tokens."""
    counts: Sequence[int]
    """Numbers of responses at once."""
    lengths: tuple[float, float]
    """Mean tokens of two kinds of responses, short and long ones, while their tokens were timed."""
    seconds: Sequence[tuple[float, float]]
    """Of a token, for each of `counts` and of `lengths`."""

    def token_seconds(self, sequences: float, length: float) -> float:
        """Returns the seconds of a token, which are linear between `counts`, and in the mean tokens so far."""
        short, long = (float(np.interp(sequences, self.counts, kind)) for kind in zip(*self.seconds, strict=True))
        first, second = self.lengths
        return short + (length - first) / (second - first) * (long - short)


def server_times(url: str, arguments: argparse.Namespace, lengths: str) -> ServerTimes:
    """Measures the times of the server: medians of three."""
    rng = random.Random(0)

    def ask(prompt: Sequence[int], new_tokens: int, seed: int) -> None:
        # As the run asks for its responses.
        sampling = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 1.0, "top_k": -1}
        body = {
            "input_ids": prompt,
            "sampling_params": {**sampling, "sampling_seed": seed},
            "return_logprob": True,
        }
        client.post(f"{url}/generate", json=body).raise_for_status()

    def seconds(requests: int, prompt_tokens: int, new_tokens: int, samples: int = arguments.samples) -> float:
        prompts = [[rng.randrange(10, 20) for _ in range(prompt_tokens)] for _ in range(math.ceil(requests / samples))]
        start = time.perf_counter()
        list(pool.map(lambda index: ask(prompts[index // samples], new_tokens, index), range(requests)))
        return time.perf_counter() - start

    ends = (1, arguments.tokens, 3 * arguments.tokens)

    def median_seconds(*what: int) -> float:
        return statistics.median(seconds(*what) for _ in range(3))

    def token_seconds(requests: int) -> tuple[float, float]:
        first, short, long = (median_seconds(requests, PROMPT_TOKENS, tokens) for tokens in ends)
        of_short, of_long = (short - first) / (ends[1] - ends[0]), (long - short) / (ends[2] - ends[1])
        return of_short, max(of_long, of_short)  # growing responses take no less, whatever the noise

    count = num_responses(arguments, lengths)
    counts = (count // TAIL_OF, count, PLACES * count)
    limits = httpx.Limits(max_connections=counts[-1])
    with httpx.Client(timeout=600.0, limits=limits) as client, ThreadPoolExecutor(counts[-1]) as pool:
        read_seconds = median_seconds(READ_PROMPTS, READ_TOKENS, 1, 1) / (READ_PROMPTS * READ_TOKENS)
        whole = median_seconds(count, PROMPT_TOKENS, 1) / count
        return ServerTimes(
            read_seconds=read_seconds,
            request_seconds=max(whole - read_seconds * PROMPT_TOKENS / arguments.samples, 0.0),
            counts=counts,
            lengths=(PROMPT_TOKENS + (ends[0] + ends[1]) / 2, PROMPT_TOKENS + (ends[1] + ends[2]) / 2),
            seconds=[token_seconds(number) for number in counts],
        )


def run(arguments: argparse.Namespace, directory: Path, url: str, lengths: str, arm: Arm, *, num_steps: int) -> None:
    schedule, ahead, in_flight = arm
    options = [
        *settings(arguments, directory, lengths),
        f"run.num_steps={num_steps}",
        f"rollout.sglang.urls=[{url}]",
        f"rollout.schedule={schedule}",
        f"rollout.max_staleness={ahead}",
        f"rollout.in_flight={in_flight}",
    ]
    command = [
        "benchmarks.async_schedules",
        "--train",
        f"--lengths={lengths}",
        f"--tokens={arguments.tokens}",
        "--",
        *options,
    ]
    log = directory.with_name(f"{directory.name}.log")
    if started(command, TRAINER_CORE, log).wait() != 0:
        raise RuntimeError(f"a run failed: see {log}")


def simulated_rate(
    lengths: str, arm: Arm, in_turn: Measures, times: ServerTimes, arguments: argparse.Namespace
) -> float:
    """Returns tokens a second by simulation. in_turn: the run in turn with such lengths.

    All times of the server are multiplied by one factor, with which generation in turn takes as long as it did.
    """
    schedule, max_staleness, in_flight = arm
    count = num_responses(arguments, lengths)
    setting = Setting(
        num_servers=1,
        places=PLACES * count,
        token_seconds=times.token_seconds,
        prefill_token_seconds=times.read_seconds,
        request_seconds=times.request_seconds,
        prompt_tokens=PROMPT_TOKENS,
        samples_per_prompt=arguments.samples,
        responses=count,
        lengths=lengths_of(count, arguments.tokens, with_tail=lengths == "tail"),
        as_listed=True,
        train_seconds=in_turn.other_seconds,
        publish_seconds=in_turn.publish_seconds,
        keep_cache=in_flight == "keep_cache",
    )
    factor = in_turn.generate_seconds / generation_seconds(setting)
    setting = replace(
        setting,
        token_seconds=lambda sequences, length: factor * times.token_seconds(sequences, length),
        prefill_token_seconds=factor * times.read_seconds,
        request_seconds=factor * times.request_seconds,
    )
    return in_turn.tokens / in_turn.num_steps / simulate(setting, schedule, max_staleness).step_seconds


def print_table(
    found: Mapping[tuple[str, Arm], Sequence[Measures]], times: Mapping[str, ServerTimes], arguments: argparse.Namespace
) -> None:
    print(
        "| lengths | schedule | max_staleness | in_flight | tokens/s | ratio | server idle | mean age | largest age "
        "| simulated |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (lengths, arm), runs in found.items():
        schedule, ahead, in_flight = arm
        bases = found[lengths, IN_TURN]
        ratio = statistics.median(mine.rate / base.rate for mine, base in zip(runs, bases, strict=True))
        idle = sum(run.idle_seconds for run in runs) / sum(run.seconds for run in runs)
        age = statistics.mean(age for run in runs for age in run.ages)
        simulated = statistics.median(
            simulated_rate(lengths, arm, base, times[lengths], arguments) / mine.rate
            for mine, base in zip(runs, bases, strict=True)
        )
        print(
            f"| {lengths} | `{schedule}` | {ahead} | `{in_flight}` "
            f"| {statistics.median(run.rate for run in runs):.0f} | {ratio:.2f} "
            f"| {idle:.0%} | {age:.2f} | {max(run.oldest for run in runs):.0f} | {simulated:.2f} |"
        )


if __name__ == "__main__":
    main()
