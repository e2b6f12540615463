"""Schedules of generation and training compared: one trainer and one SGLang server, a core each, run after run.

    python -m benchmarks.async_schedules [--steps 20] [--rounds 1]

Responses have a fixed length: nothing stops them. With the planted tail, one of 32 is ten times as long. The objective
trains on every response, with a learning rate that changes next to nothing. Prints a Markdown table of the steps in the
middle of a run, without the first steps, for which nothing was generated ahead, and the last ones, beside which nothing
is left to generate: trained response tokens a second, their ratio to `in_turn`, the share of the time in which the
server had no request, and the mean and largest age of the trained tokens in updates. A short run before the others
warms the server up.

The last column is what the planner's simulation makes of the times of the two runs in turn, of the time in which the
server reads a token, and of how much longer a token takes with the server full than with the responses of one step:
tokens a second by simulation, over those measured.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.plain_run import PLAIN_RUN
from oreal_megatron.metrics import read_metrics
from oreal_megatron.planner.schedules import Setting, simulate

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
    ],
}
"""Lengths of responses -> rollout.schedule, rollout.max_staleness and rollout.in_flight of runs."""
IN_TURN = ("in_turn", 0, "recompute")
READ_PROMPTS, READ_TOKENS = 32, 256
PLACES = 256
"""Responses that the server generates at once at most."""


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


def settings(arguments: argparse.Namespace, directory: Path) -> list[str]:
    """Overrides that all runs share, and their server."""
    longest = TAIL_TIMES * arguments.tokens
    return [
        "experiment=arithmetic_sglang",
        "objective=reinforce",
        *PLAIN_RUN,
        "sft.steps=1",
        "optimizer.policy={lr: 1.0e-9, min_lr: 1.0e-9}",
        f"data.prompts_per_step={arguments.prompts}",
        f"rollout.samples_per_prompt={arguments.samples}",
        f"rollout.sampling={{temperature: 1.0, top_p: 1.0, max_new_tokens: {longest}}}",
        "rollout.mismatch=null",
        "rollout.undecided=null",
        "rollout.sglang.startup_seconds=900.0",
        f"rollout.sglang.max_concurrency={PLACES}",
        "rollout.sglang.arguments.max-total-tokens=65536",
        f"model.max_sequence_length={longest + 128}",
        f"model.geometry.hidden_size={arguments.hidden}",
        f"model.geometry.ffn_hidden_size={2 * arguments.hidden}",
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
def server(arguments: argparse.Namespace, directory: Path) -> Iterator[str]:
    """Runs a server; yields its URL. It takes its config.json from the first run that attaches to it."""
    announced = directory / "urls"
    options = settings(arguments, directory / FIRST)
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
        made.requests = [
            replace(request, max_new_tokens=length_of(index, arguments)) for index, request in enumerate(made.requests)
        ]
        return made

    def endless(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**options(self, *args, **kwargs), "stop_token_ids": [], "ignore_eos": True}

    Sampler.call, RequestQueue.options = planted, endless  # type: ignore[method-assign]
    sys.argv = ["oreal-train", *arguments.overrides]
    train_main()


def length_of(index: int, arguments: argparse.Namespace) -> int:
    """Returns the tokens of a step's response."""
    is_long = arguments.lengths == "tail" and index % TAIL_OF == TAIL_OF - 1
    return arguments.tokens * (TAIL_TIMES if is_long else 1)


def measured(directory: Path, max_staleness: int) -> Measures:
    """Returns the measures of a run. The first and last `max_staleness` + 1 steps are left out."""
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
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="runs of every schedule, in turns")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of a response that is not in the tail")
    parser.add_argument("--hidden", type=int, default=256, help="size of the model, which sets what training takes")
    parser.add_argument("--directory", type=Path, help="for the runs, which are kept; none: a temporary one")
    parser.add_argument("--lengths", choices=sorted(ARMS), help=argparse.SUPPRESS)  # of a trainer's process
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    least = 2 * max(max_staleness for arms in ARMS.values() for _, max_staleness, _ in arms) + 3
    if arguments.steps < least:
        parser.error(f"--steps = {arguments.steps} leaves no step in the middle of a run; set it to at least {least}")
    if arguments.lengths is not None:
        train(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        found: dict[tuple[str, Arm], list[Measures]] = {}
        with server(arguments, directory) as url:
            run(arguments, directory / FIRST, url, "even", IN_TURN, num_steps=1)
            times = server_times(url, arguments)
            for turn in range(arguments.rounds):
                for lengths, arm in [(key, arm) for key, arms in ARMS.items() for arm in arms]:
                    own = directory / "_".join(map(str, (lengths, *arm, turn)))
                    run(arguments, own, url, lengths, arm, num_steps=arguments.steps)
                    found.setdefault((lengths, arm), []).append(measured(own, arm[1]))
    print_table(found, times, arguments)


@dataclass(frozen=True, kw_only=True)
class ServerTimes:
    """Times of the server."""

    read_seconds: float
    """Of a token of a prompt."""
    full_ratio: float
    """Time of a token with `PLACES` responses at once, over that with the responses of a step."""


def server_times(url: str, arguments: argparse.Namespace) -> ServerTimes:
    """Measures the times of the server: medians of three."""
    rng = random.Random(0)

    def seconds(prompts: int, prompt_tokens: int, new_tokens: int) -> float:
        ids = [[rng.randrange(10, 20) for _ in range(prompt_tokens)] for _ in range(prompts)]
        # As the run asks for its responses.
        sampling = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 1.0, "top_k": -1}
        parameters = [{**sampling, "sampling_seed": seed} for seed in range(prompts)]
        body = {"input_ids": ids, "sampling_params": parameters, "return_logprob": True}
        start = time.perf_counter()
        httpx.post(f"{url}/generate", json=body, timeout=600.0).raise_for_status()
        return time.perf_counter() - start

    def decode_seconds(prompts: int) -> float:
        return seconds(prompts, 16, arguments.tokens) - seconds(prompts, 16, 1)

    count = arguments.prompts * arguments.samples
    reads = [seconds(READ_PROMPTS, READ_TOKENS, 1) / (READ_PROMPTS * READ_TOKENS) for _ in range(3)]
    ratios = [decode_seconds(PLACES) / decode_seconds(count) for _ in range(3)]
    return ServerTimes(read_seconds=statistics.median(reads), full_ratio=statistics.median(ratios))


def run(arguments: argparse.Namespace, directory: Path, url: str, lengths: str, arm: Arm, *, num_steps: int) -> None:
    schedule, ahead, in_flight = arm
    options = [
        *settings(arguments, directory),
        f"run.num_steps={num_steps}",
        f"rollout.sglang.urls=[{url}]",
        f"rollout.schedule={schedule}",
        f"rollout.max_staleness={ahead}",
        f"rollout.in_flight={in_flight}",
    ]
    command = ["benchmarks.async_schedules", f"--lengths={lengths}", f"--tokens={arguments.tokens}", "--", *options]
    log = directory.with_name(f"{directory.name}.log")
    if started(command, TRAINER_CORE, log).wait() != 0:
        raise RuntimeError(f"a run failed: see {log}")


def simulated_rate(
    lengths: str, arm: Arm, even: Measures, tail: Measures, times: ServerTimes, arguments: argparse.Namespace
) -> float:
    """Returns tokens a second by simulation. even, tail: runs in turn with such lengths.

    Times of tokens include that of reading prompts. In the runs in turn, all responses of a step have `--tokens` tokens
    at the same time, and the long ones the rest by themselves. With the full server these are three times of a token,
    between which it is linear in the number of responses.
    """
    schedule, max_staleness, in_flight = arm
    count = arguments.prompts * arguments.samples
    few = count // TAIL_OF
    many_seconds = even.generate_seconds / arguments.tokens
    few_seconds = (tail.generate_seconds - even.generate_seconds) / ((TAIL_TIMES - 1) * arguments.tokens)
    counts, seconds = (few, count, PLACES), (few_seconds, many_seconds, many_seconds * times.full_ratio)
    base = even if lengths == "even" else tail
    setting = Setting(
        num_servers=1,
        places=PLACES,
        token_seconds=lambda sequences: float(np.interp(sequences, counts, seconds)),
        prefill_token_seconds=times.read_seconds,
        prompt_tokens=0.0,
        samples_per_prompt=arguments.samples,
        responses=count,
        lengths=[arguments.tokens * (TAIL_TIMES if lengths == "tail" and index < few else 1) for index in range(count)],
        train_seconds=base.other_seconds,
        publish_seconds=base.publish_seconds,
        keep_cache=in_flight == "keep_cache",
    )
    return base.tokens / base.num_steps / simulate(setting, schedule, max_staleness).step_seconds


def print_table(
    found: Mapping[tuple[str, Arm], Sequence[Measures]], times: ServerTimes, arguments: argparse.Namespace
) -> None:
    print(
        "| lengths | schedule | max_staleness | in_flight | tokens/s | ratio | server idle | mean age | largest age "
        "| simulated |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (lengths, arm), runs in found.items():
        schedule, ahead, in_flight = arm
        in_turn = {key: found[key, IN_TURN] for key in ARMS}
        ratio = statistics.median(mine.rate / base.rate for mine, base in zip(runs, in_turn[lengths], strict=True))
        idle = sum(run.idle_seconds for run in runs) / sum(run.seconds for run in runs)
        age = statistics.mean(age for run in runs for age in run.ages)
        simulated = statistics.median(
            simulated_rate(lengths, arm, even, tail, times, arguments) / mine.rate
            for mine, even, tail in zip(runs, in_turn["even"], in_turn["tail"], strict=True)
        )
        print(
            f"| {lengths} | `{schedule}` | {ahead} | `{in_flight}` "
            f"| {statistics.median(run.rate for run in runs):.0f} | {ratio:.2f} "
            f"| {idle:.0%} | {age:.2f} | {max(run.oldest for run in runs):.0f} | {simulated:.2f} |"
        )


if __name__ == "__main__":
    main()
