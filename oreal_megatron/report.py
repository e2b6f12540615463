"""Report of a run: a single HTML file with its figures, which opens without a server."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from oreal_megatron.files import write_atomically
from oreal_megatron.metrics import read_metrics
from oreal_megatron.types import Verdict

# Panels of the figure: title, then (label, key) of each line.
_PANELS = (
    ("Correct responses in training", (("pass rate", "reward/pass_rate"),)),
    ("Groups to learn from", (("kept", "data/kept_groups"), ("all", "data/groups"))),
    ("Policy loss terms", (("positive", "loss/positive"), ("negative", "loss/negative"))),
    ("KL to the reference (nats a token)", (("k3", "loss/kl"), ("k1", "policy/kl_k1"))),
    ("Entropy (nats a token)", (("entropy", "policy/entropy"),)),
    ("Response length (tokens)", (("mean", "rollout/response_tokens"),)),
    ("Reward model loss", (("cross-entropy", "loss/reward_model"),)),
    ("Reward model AUC on fresh pairs", (("AUC", "reward_model/auc"),)),
    ("Mean token weight", (("weight", "policy/token_weight"),)),
)
_NUM_EXAMPLES = 6


def write_report(directory: Path) -> Path:
    """Writes report.html from the metrics, evaluations and trajectories in a run's directory; returns its path.

    Raises:
        ValueError: the directory holds no run.
    """
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{directory}: config.yaml is missing, so there is no run; name the run.dir of a run")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    steps, evaluations = read_metrics(directory)
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(resources.files("oreal_megatron").joinpath("templates/report.html").read_text())
    path = directory / "report.html"
    write_atomically(
        path,
        template.render(
            config=config,
            config_text=yaml.safe_dump(config, sort_keys=False),
            headline=_headline(evaluations),
            evaluations=evaluations,
            evaluation_names=list(dict.fromkeys(name for record in evaluations for name in record["metrics"])),
            num_steps=len(steps),
            skipped=[record for record in steps if record["skipped"]],
            seconds=_mean_seconds(steps),
            pass_figure=_pass_figure(evaluations),
            figure=_training_figure(steps),
            calibration_figure=_calibration_figure(directory),
            examples=_examples(directory, steps),
        ),
    )
    return path


def _headline(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns greedy pass@1 of every benchmark in percent: before training, at the end, and at its best."""
    names = [name for name in (evaluations[0]["metrics"] if evaluations else ()) if name.endswith("/greedy_pass@1")]
    lines = []
    for name in names:
        scores = [(100 * record["metrics"][name], record["step"]) for record in evaluations]
        best, step = max(scores, key=lambda score: score[0])
        lines.append(
            {
                "benchmark": name.partition("/")[0],
                "problems": evaluations[-1]["metrics"].get(name.replace("greedy_pass@1", "problems")),
                "before": scores[0][0],
                "after": scores[-1][0],
                "best": best,
                "best_step": step,
            }
        )
    return lines


def _pass_figure(evaluations: Sequence[dict[str, Any]]) -> str | None:
    names = sorted({name for record in evaluations for name in record["metrics"] if "pass@" in name or "avg@" in name})
    if not names:
        return None
    figure, axes = _subplots(1, 1, width=6.4)
    for name in names:
        points = [(r["step"], 100 * r["metrics"][name]) for r in evaluations if r["metrics"].get(name) is not None]
        axes[0].plot(*zip(*points, strict=True), marker="o", label=name)
    axes[0].set(title="Held-out problems solved", xlabel="step", ylabel="%", ylim=(0, 100))
    axes[0].legend()
    return _svg(figure)


def _training_figure(steps: Sequence[dict[str, Any]]) -> str | None:
    panels = [panel for panel in _PANELS if any(key in r["metrics"] for r in steps for _, key in panel[1])]
    if not panels:
        return None
    rows = math.ceil(len(panels) / 3)
    figure, axes = _subplots(rows, 3, width=13)
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for label, key in lines:
            points = [(r["step"], r["metrics"][key]) for r in steps if r["metrics"].get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set(title=title, xlabel="step")
        if len(lines) > 1:
            axis.legend()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return _svg(figure)


def _calibration_figure(directory: Path) -> str | None:
    """Plots the predicted probability against the share of correct responses, at the last evaluation."""
    files = sorted((directory / "evaluations").glob("*.jsonl"), key=lambda path: path.stem[-6:])
    records = [json.loads(line) for line in files[-1].read_text().splitlines()] if files else []
    scored = [
        (1 / (1 + math.exp(-r["reward_model_logit"])), Verdict(r["grade"]["verdict"]) is Verdict.CORRECT)
        for r in records
        if "reward_model_logit" in r
    ]
    if not scored:
        return None
    scored.sort()
    num_bins = min(10, len(scored))
    bins = [scored[len(scored) * i // num_bins : len(scored) * (i + 1) // num_bins] for i in range(num_bins)]
    figure, axes = _subplots(1, 1, width=4.2)
    axes[0].plot([0, 1], [0, 1], color="0.7", linestyle="--")
    axes[0].plot(
        [sum(p for p, _ in bin) / len(bin) for bin in bins],
        [sum(correct for _, correct in bin) / len(bin) for bin in bins],
        marker="o",
    )
    axes[0].set(title="Reward model, tenths of the samples", xlabel="predicted", ylabel="correct")
    return _svg(figure)


def _examples(directory: Path, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns trained responses of the last step that has token weights."""
    for record in reversed(steps):
        path = directory / "trajectories" / f"step_{record['step']:06d}.jsonl"
        if not path.is_file():
            continue
        rollouts = [json.loads(line) for line in path.read_text().splitlines()]
        weighted = [r for r in rollouts if r.get("token_weights") and r.get("token_texts")]
        if weighted:
            return [_example(r, record["step"]) for r in weighted[:_NUM_EXAMPLES]]
    return []


def _example(record: dict[str, Any], step: int) -> dict[str, Any]:
    correct = Verdict(record["grade"]["verdict"]) is Verdict.CORRECT
    hue = "46, 160, 67" if correct else "218, 54, 51"
    tokens = [
        {"text": text, "weight": weight, "colour": f"rgba({hue}, {0.85 * weight:.3f})"}
        for text, weight in zip(record["token_texts"], record["token_weights"], strict=True)
    ]
    return {
        "step": step,
        "question": record["prompt"]["question"],
        "gold_answer": record["prompt"]["gold_answer"],
        "verdict": record["grade"]["verdict"],
        "advantage": record["advantage"],
        "tokens": tokens,
    }


def _mean_seconds(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    # Phases in the order of a step; a step that trained both models has all of them.
    fullest: dict[str, float] = max((record["seconds"] for record in steps), key=len, default={})
    return {phase: sum(r["seconds"].get(phase, 0.0) for r in steps) / len(steps) for phase in fullest}


def _subplots(rows: int, columns: int, *, width: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, 3.4 * rows), squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
