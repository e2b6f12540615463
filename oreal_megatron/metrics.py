"""Tracking of a run: metrics go to metrics.jsonl, console, tensorboard, wandb and Prometheus, trajectories to JSONL."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from oreal_megatron.config import ConfigError, TrainConfig, Violation
from oreal_megatron.data.difficulty import drawn_shares
from oreal_megatron.extensions import tracker_function
from oreal_megatron.files import (
    append_line,
    json_line,
    kept_id,
    open_log,
    whole_lines,
    write_parts_atomically,
)
from oreal_megatron.losses.advantages import Selection
from oreal_megatron.prometheus import PrometheusEndpoint
from oreal_megatron.trends import Trends
from oreal_megatron.types import EvaluationReport, FinishReason, GradedRollout, StepReport, decided

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

# Metrics that the console shows of a step, in this order: key, label, format.
_SHOWN = (
    ("reward/pass_rate", "correct", "{:.0%}"),
    ("data/kept_groups", "groups", "{:.0f}"),
    ("loss/policy", "loss", "{:+.4f}"),
    ("loss/kl", "KL", "{:.4f}"),
    ("loss/reward_model", "reward model loss", "{:.3f}"),
    ("reward_model/auc_within_prompts", "reward model AUC within prompts", "{:.2f}"),
    ("rollout/response_tokens", "tokens", "{:.0f}"),
)
_SHOWN_IN_SFT = (
    ("loss/nll", "loss", "{:.4f}"),
    ("policy/lr", "learning rate", "{:.3g}"),
    ("policy/grad_norm", "gradient norm", "{:.3g}"),
    ("sft/epoch", "epoch", "{:.2f}"),
    ("sft/tokens_per_second", "tokens/s", "{:,.0f}"),
)


class Tracker:
    """Writes reports to every place that the tracking section names; does nothing on ranks but the main rank."""

    def __init__(self, config: TrainConfig, directory: Path, *, is_main: bool):
        """Opens the endpoint for Prometheus and the wandb run.

        Raises:
            ConfigError: the endpoint's port is in use; wandb refuses, for example without an API key; the function of
                `tracking.function` cannot be used.
        """
        self._config = config
        self._directory = directory
        self._is_main = is_main
        quiet = config.tracking.console == "quiet" or not is_main
        # A progress bar needs console=rich and a terminal; otherwise plain lines are logged.
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True, stderr=False)
        self._fancy = config.tracking.console == "rich" and self.console.is_terminal and not quiet
        self._file: IO[bytes] | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._prometheus: PrometheusEndpoint | None = None
        self._own = tracker_function(config.tracking) if is_main else None
        with contextlib.ExitStack() as opened:
            if is_main and config.tracking.prometheus_port is not None:
                self._prometheus = PrometheusEndpoint(config.tracking.prometheus_port, run=directory.resolve().name)
                opened.callback(self._prometheus.close)
            if is_main and config.tracking.wandb != "disabled":
                self._wandb = self._open_wandb()
            opened.pop_all()  # all of it is open until `close`
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="trajectories")
        self._being_written: Future[None] | None = None
        self._trends = Trends()
        self._newest_step = -1
        """Number of the last step whose metrics were logged."""

    def start(self, first_step: int, *, is_evaluated: bool, pending_evaluation: int | None = None) -> None:
        """Opens the files to go on from `first_step`; records of later steps are removed.

        Where earlier records are missing or cannot be read, a warning says which, and the file is kept as
        metrics.jsonl.damaged.

        is_evaluated: whether the evaluation after `first_step` steps was made, so that its record is kept.
        pending_evaluation: step of the evaluation that is under way, and whose record will be written again.
        """
        if not self._is_main:
            return
        self._newest_step = first_step - 1
        path = self._directory / METRICS_FILE
        kept = _drop_from(path, first_step, is_evaluated, pending_evaluation)
        for record in kept:
            if record["kind"] == "step":
                self._trends.add(record["metrics"])
        self._file = open_log(path)
        if self._config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._directory / "tensorboard"), purge_step=first_step)
        if self._prometheus is not None:
            port = self._config.tracking.prometheus_port
            logger.info("metrics for Prometheus: http://%s:%d/metrics", socket.gethostname(), port)

    def _open_wandb(self) -> Any:
        try:
            import wandb
        except ImportError:
            logger.warning("tracking.wandb is off, since wandb is not installed; install it with `pip install wandb`")
            return None
        run = self._config.run
        mode = self._config.tracking.wandb
        try:
            opened = wandb.init(
                project=self._config.tracking.wandb_project,
                name=run.name,
                id=kept_id(self._directory / "wandb_id"),
                resume="allow",
                mode=mode,
                dir=str(self._directory),
                config=self._config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True),
            )
            opened.define_metric("evaluation/*", step_metric="evaluation/step")
            return opened
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            remedy = f"wandb says: {reason}. Run `wandb login` or set WANDB_API_KEY, or set tracking.wandb=offline."
            raise ConfigError([Violation("tracking.wandb", mode, remedy)]) from error

    @contextlib.contextmanager
    def progress(self, title: str, total: int, completed: int = 0) -> Iterator[ProgressBar]:
        """Shows a progress bar followed by a note; without a terminal, logs note and time left at every tenth."""
        if not self._fancy or not total:
            yield ProgressBar(None, None, title, total, completed)
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total, completed=completed, note="")
            yield ProgressBar(progress, task, title, total, completed)

    def step(self, report: StepReport) -> None:
        """Writes a step's report, and logs its main metrics as a line."""
        self._write(report.to_json())
        self._newest_step = report.step
        seconds = {f"seconds/{phase}": value for phase, value in report.seconds.items()}
        peaks = {f"peak_gib/{phase}": value for phase, value in report.peak_gib.items()}
        values = {**report.metrics, **seconds, **peaks}
        self._log(values, report.step)
        if self._prometheus is not None:
            self._prometheus.step(values, report.step)
        self._trends.add(report.metrics)
        self._trends.warn()
        if report.skipped:
            logger.info("step %d  updated nothing: %s", report.step, report.skipped)
            return
        parts = [
            f"{label} {form.format(report.metrics[key])}"
            for key, label, form in (_SHOWN_IN_SFT if self._config.is_sft else _SHOWN)
            if key in report.metrics and math.isfinite(report.metrics[key])
        ]
        if report.metrics.get("policy/frozen"):
            parts.append("policy frozen")
        logger.info("step %d  %s  in %.1f s", report.step, "  ".join(parts), report.seconds["total"])

    def evaluation(self, report: EvaluationReport) -> None:
        """Writes an evaluation's report, and logs its metrics."""
        self._write(report.to_json())
        waited = {} if report.waited_seconds is None else {"waited_seconds": report.waited_seconds}
        values = {f"evaluation/{name}": value for name, value in {**report.metrics, **waited}.items()}
        self._log(values, report.step, is_evaluation=True, is_late=report.step <= self._newest_step)
        if self._prometheus is not None:
            self._prometheus.evaluation({**report.metrics, **waited}, report.step)
        when = f"after {report.step} steps" if report.step else "before the first step"
        for benchmark in dict.fromkeys(name.partition("/")[0] for name in report.metrics):
            own = {name: value for name, value in report.metrics.items() if name.startswith(f"{benchmark}/")}
            shown = "  ".join(f"{name.partition('/')[2]} {shown_value(name, value)}" for name, value in own.items())
            logger.info("evaluation %s  %s: %s", when, benchmark, shown)

    def trajectories(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records to `name`.jsonl below the run's directory, one JSON object per line, while the run goes on.

        records: iterated in a thread. The file before it is waited for, so that at most one step's records are kept.

        Raises:
            OSError: the file before it could not be written.
        """
        if self._is_main:
            self.finish_trajectories()
            path = self._directory / f"{name}.jsonl"
            self._being_written = self._writer.submit(write_parts_atomically, path, map(json_line, records))

    def finish_trajectories(self) -> None:
        """Returns once the records given to `trajectories` are on the disk.

        Raises:
            OSError: they could not be written.
        """
        written, self._being_written = self._being_written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Closes the files and trackers; an error of records that nothing has waited for is logged."""
        self._writer.shutdown()
        if self._being_written is not None and (error := self._being_written.exception()):
            logger.error("%s", error)
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._prometheus is not None:
            self._prometheus.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            append_line(self._file, json_line(record))
        if self._own is not None:
            try:
                self._own(record=record, directory=self._directory)
            except ValueError as error:  # a service that does not answer ends no run
                logger.error("%s", error)

    def _log(
        self, values: Mapping[str, float], step: int, *, is_evaluation: bool = False, is_late: bool = False
    ) -> None:
        """Gives values of a step, or of the evaluation after `step` steps, to tensorboard and wandb.

        is_late: whether values of later steps were given before.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is None:
            return
        if is_evaluation:
            finite["evaluation/step"] = step
        if is_late:
            # wandb takes nothing for an earlier step: the values join its newest row, under their own evaluation/step.
            self._wandb.log(finite, commit=False)
        else:
            # wandb takes each step once: the first record of a step that is repeated after a kill stays.
            self._wandb.log({**finite, "step": step}, step=step)


def shown_value(name: str, value: float | None) -> str:
    """Returns an evaluation's metric as people read it: shares in percent, `-` where there is none (null or nan)."""
    if value is None or not math.isfinite(value):
        return "-"
    kind = name.rpartition("/")[2]
    if "@" in kind or kind in ("stopped", "undecided_share", "truncated_share", "no_answer_share"):
        return f"{value:.1%}"
    if kind.endswith("_loss"):
        return f"{value:.4f}"
    return f"{value:.2f}" if "_auc" in kind else f"{value:.0f}" if value == int(value) else f"{value:.1f}"


class ProgressBar:
    """Progress bar on a terminal, or lines in the log without a terminal."""

    def __init__(self, progress: Progress | None, task: Any, title: str, total: int, done: int):
        self._progress, self._task, self._title, self._total = progress, task, title, total
        self._done = self._done_before = done
        self._started = time.monotonic()

    def advance(self, note: str = "", *, by: int = 1) -> None:
        """Advances the bar by `by`, and shows the note."""
        before, self._done = self._done, self._done + by
        if self._progress is not None:
            self._progress.update(self._task, advance=by, note=note)
        elif note and before * 10 // self._total != self._done * 10 // self._total:
            per_item = (time.monotonic() - self._started) / max(self._done - self._done_before, 1)
            remaining = timedelta(seconds=round(per_item * (self._total - self._done)))
            logger.info("%s %d/%d  %s  %s remaining", self._title, self._done, self._total, note, remaining)


def read_metrics(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns (step records, evaluation records) of a run's directory; a half-written last line is left out.

    Raises:
        ValueError: another line is not a metrics record; the message names file and line.
    """
    path = directory / METRICS_FILE
    records, damaged = _read(path)
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}. Remove these lines, or resume the run, which leaves them out")
    return [r for r in records if r["kind"] == "step"], [r for r in records if r["kind"] == "evaluation"]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records of a file, and for each line that is none its file, number and problem."""
    records, damaged = [], []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            record = orjson.loads(line)
            if record["kind"] not in ("step", "evaluation"):
                raise ValueError(f"kind is {record['kind']!r}")
            if not isinstance(record["step"], int) or not isinstance(record["metrics"], dict):
                raise TypeError("step is not a number, or metrics not an object")
            records.append(record)
        except (KeyError, TypeError, ValueError) as error:
            damaged.append(f"{path}:{number}: not a metrics record: {error!r}")
    return records, damaged


def _drop_from(path: Path, first_step: int, is_evaluated: bool, pending_evaluation: int | None) -> list[dict[str, Any]]:
    """Removes the records of what runs again, from `first_step` on, and returns the others in the order of their steps.

    Warns of earlier steps that have no record. For the arguments see `Tracker.start`.
    """
    records, damaged = _read(path)
    missing = sorted(set(range(first_step)) - {r["step"] for r in records if r["kind"] == "step"})
    if damaged:
        copy = path.with_name(path.name + ".damaged")
        shutil.copyfile(path, copy)
        logger.warning("%s; left out, and kept in %s", "; ".join(damaged), copy.name)
    if missing:
        which = (
            f"step {missing[0]}" if len(missing) == 1 else f"{len(missing)} steps from {missing[0]} to {missing[-1]}"
        )
        logger.warning("%s has no record of %s of %d that were trained; the run goes on", path, which, first_step)
    kept = [
        r
        for r in records
        if r["step"] < first_step + (is_evaluated and r["kind"] == "evaluation")
        and (r["kind"] == "step" or r["step"] != pending_evaluation)
    ]
    kept.sort(key=lambda r: (r["step"], r["kind"] == "step"))
    write_parts_atomically(path, map(json_line, kept))
    return kept


def mean_credit(graded: Sequence[GradedRollout]) -> float:
    """Returns the mean credit of decided responses, in [0, 1]; nan without one."""
    credits = [one.credit for one in decided(graded)]
    return sum(credits) / len(credits) if credits else math.nan


def rollout_metrics(groups: Sequence[Sequence[GradedRollout]], selection: Selection) -> dict[str, float]:
    """Returns metrics of a step's responses, and of the selection that trains."""
    rollouts = [graded.rollout for group in groups for graded in group]
    stages = Counter(graded.grade.stage for group in groups for graded in group)
    prompts = [group[0].rollout.prompt for group in groups]
    count = max(len(rollouts), 1)
    inserted = sum(rollout.num_response_tokens - rollout.num_policy_tokens for rollout in rollouts)
    return {
        **{f"verifier/share_by_{stage}": number / count for stage, number in sorted(stages.items())},
        "rollout/responses": float(len(rollouts)),
        "rollout/response_tokens": sum(rollout.num_response_tokens for rollout in rollouts) / count,
        **({"rollout/inserted_tokens": inserted / count} if inserted else {}),
        "rollout/stopped": sum(rollout.finish_reason is FinishReason.STOP for rollout in rollouts) / count,
        "reward/pass_rate": selection.pass_rate,
        "reward/credit": mean_credit([graded for group in groups for graded in group]),
        "reward/undecided": float(selection.num_undecided),
        "data/groups": float(selection.num_groups),
        "data/kept_groups": float(selection.num_kept_groups),
        "data/all_correct_groups": float(selection.num_all_correct),
        "data/all_incorrect_groups": float(selection.num_all_incorrect),
        "data/trajectories": float(len(selection.trajectories)),
        **{f"data/drawn_{name}": share for name, share in drawn_shares(prompts).items()},
    }
