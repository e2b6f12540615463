"""Report of a run: a single HTML file with its figures, which opens without a server."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import orjson
import yaml

from oreal_megatron import __version__
from oreal_megatron.files import write_atomically
from oreal_megatron.metrics import read_metrics, shown_value
from oreal_megatron.types import Verdict

# Panels: title, unit, factor, then (label, key) of each line.
_PANELS = (
    ("Correct responses in training", "%", 100, (("correct", "reward/pass_rate"),)),
    ("Groups of a step", "groups", 1, (("used for training", "data/kept_groups"), ("all", "data/groups"))),
    ("Loss of the policy", "loss", 1, (("correct", "loss/positive"), ("incorrect", "loss/negative"))),
    ("KL to the reference model", "nats per token", 1, (("k3 (loss)", "loss/kl"), ("k1", "policy/kl_k1"))),
    ("Entropy of the policy", "nats per token", 1, (("entropy", "policy/entropy"),)),
    ("Length of responses", "tokens", 1, (("mean", "rollout/response_tokens"),)),
)
_SFT_PANELS = (
    ("Loss of fine-tuning", "nats per trained token", 1, (("loss", "loss/nll"),)),
    ("Learning rate", "learning rate", 1, (("learning rate", "policy/lr"),)),
    ("Norm of the gradient", "norm before clipping", 1, (("norm", "policy/grad_norm"),)),
    ("Speed", "tokens per second", 1, (("tokens per second", "sft/tokens_per_second"),)),
)
_REWARD_MODEL_PANELS = (
    ("Loss of the reward model", "cross-entropy", 1, (("cross-entropy", "loss/reward_model"),)),
    (
        "AUC of the reward model",
        "AUC (0.5: guessing)",
        1,
        (("within prompts", "reward_model/auc_within_prompts"), ("all pairs", "reward_model/auc")),
    ),
    ("Mean token weight", "weight", 1, (("weight", "policy/token_weight"),)),
    ("Tokens of weight 0", "%", 100, (("tokens", "policy/zero_token_weights"),)),
)
_PACKAGES = ("torch", "megatron-core", "transformers")
_NUM_EXAMPLES = 6
_TOKENS_BEFORE, _TOKENS_AFTER = 40, 600
"""Tokens of an example that are shown before and from the token where its two responses part."""
_NUM_BINS = 20
_MOST_POINTS = 500
"""Points of a line in a plot; more would make the file of a run with long responses too large to open."""
_COLOURS = {"CORRECT": "tab:green", "INCORRECT": "tab:red"}


def write_report(directory: Path) -> Path:
    """Writes report.html from the metrics, evaluations and trajectories in a run's directory; returns its path.

    Raises:
        ValueError: the directory holds no run.
    """
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{directory}: config.yaml is missing, so there is no run; name the run.dir of a run")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    steps, evaluations = read_metrics(directory)
    weighted = _weighted(directory, steps)
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
            epochs=steps[-1]["metrics"].get("sft/epoch") if steps else None,
            evaluation_figures=[f for f in (_pass_figure(evaluations), _heldout_figure(evaluations)) if f is not None],
            training_figures=_training_figures(
                steps, _SFT_PANELS if config["run"]["mode"] == "sft" else [*_PANELS, *_drawn_panels(steps)]
            ),
            reward_model_figures=_reward_model_figures(directory, steps, weighted),
            shown_value=shown_value,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            version=__version__,
            versions=_versions(),
            examples=_examples(weighted[1]),
        ),
    )
    return path


def _headline(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns greedy pass@1 of every benchmark as text: at the first and the last evaluation, and at its best."""
    names = [name for name in (evaluations[0]["metrics"] if evaluations else ()) if name.endswith("/greedy_pass@1")]
    lines = []
    for name in names:
        benchmark = name.partition("/")[0]
        scores = [(record["metrics"].get(name), record["step"]) for record in evaluations]
        best, step = max(scores, key=lambda score: -1.0 if score[0] is None else score[0])
        problems = evaluations[-1]["metrics"].get(f"{benchmark}/problems")
        lines.append(
            {
                "benchmark": benchmark,
                "problems": None if problems is None else int(problems),
                "first": shown_value(name, scores[0][0]),
                "last": shown_value(name, scores[-1][0]),
                "steps": scores[-1][1],
                "best": shown_value(name, best),
                "best_step": step,
            }
        )
    return lines


def _versions() -> str:
    """Returns the versions of Python and of the packages that compute, as installed where the report is written."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def _pass_figure(evaluations: Sequence[dict[str, Any]]) -> str | None:
    names = sorted({name for record in evaluations for name in record["metrics"] if "pass@" in name or "avg@" in name})
    if not names or len(evaluations) < 2:
        return None
    figure, axis = _panel("Evaluation: problems solved", "after step", "%")
    for name in names:
        _plot(axis, name, [(r["step"], r["metrics"].get(name)) for r in evaluations], 100, marker="o")
    axis.set_ylim(0, 100)
    if axis.lines:
        axis.legend()
    return _svg(figure)


def _heldout_figure(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """Plots the loss of held-out records over the evaluations of supervised fine-tuning."""
    losses = [(record["step"], record["metrics"].get("sft/heldout_loss")) for record in evaluations]
    if len(losses) < 2 or all(loss is None for _, loss in losses):
        return None
    figure, axis = _panel("Loss of held-out records", "after step", "nats per trained token")
    _plot(axis, "loss", losses, 1, marker="o")
    return _svg(figure)


def _reward_model_figures(
    directory: Path, steps: Sequence[dict[str, Any]], weighted: tuple[int, Sequence[dict[str, Any]]]
) -> list[str]:
    """Returns figures of the reward model and its token weights; none for a run without a reward model."""
    if not any("loss/reward_model" in record["metrics"] for record in steps):
        return []
    more = (_calibration_figure(directory), _position_figure(*weighted))
    return _training_figures(steps, _REWARD_MODEL_PANELS) + [figure for figure in more if figure is not None]


def _training_figures(steps: Sequence[dict[str, Any]], panels: Sequence[tuple[Any, ...]]) -> list[str]:
    """Returns a figure for each panel whose metrics the run has."""
    figures = []
    for title, unit, factor, lines in panels:
        if not any(key in record["metrics"] for record in steps for _, key in lines):
            continue
        figure, axis = _panel(title, "step", unit)
        for label, key in lines:
            _plot(axis, label, [(r["step"], r["metrics"].get(key)) for r in steps], factor)
        if len(axis.lines) > 1:
            axis.legend()
        figures.append(_svg(figure))
    return figures


def _drawn_panels(steps: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Returns panels of the prompts that steps drew: by band of pass rate and by source, where the run has these."""
    keys = dict.fromkeys(key for record in steps for key in record["metrics"])
    panels: list[tuple[Any, ...]] = []
    for title, prefix in (("Prompts by pass rate", "data/drawn_pass_rate_"), ("Prompts by source", "data/drawn_from_")):
        lines = tuple((key.removeprefix(prefix).replace("_to_", " to "), key) for key in keys if key.startswith(prefix))
        shown = [line for line in lines if any(record["metrics"].get(line[1]) for record in steps)]
        if shown:
            panels.append((title, "%", 100, shown))
    return panels


def _calibration_figure(directory: Path) -> str | None:
    """Plots the predicted probability against the share of correct responses, at the last evaluation."""
    files = sorted((directory / "evaluations").glob("*.jsonl"), key=lambda path: path.stem[-6:])
    scored = [
        (1 / (1 + math.exp(-r["reward_model_logit"])), Verdict(r["grade"]["verdict"]) is Verdict.CORRECT)
        for path in files[-1:]
        for r in _records(path)
        if "reward_model_logit" in r
    ]
    if not scored:
        return None
    scored.sort()
    num_bins = min(10, len(scored))
    bins = [scored[len(scored) * i // num_bins : len(scored) * (i + 1) // num_bins] for i in range(num_bins)]
    figure, axis = _panel("Calibration of the reward model", "predicted chance of correct (%)", "correct (%)")
    axis.plot([0, 100], [0, 100], color="0.7", linestyle="--", label="perfect")
    means = [(100 * sum(p for p, _ in bin) / len(bin), sum(correct for _, correct in bin) / len(bin)) for bin in bins]
    _plot(axis, f"{num_bins} groups of about {len(scored) // num_bins} responses", means, 100, marker="o")
    axis.legend()
    return _svg(figure)


def _weighted(directory: Path, steps: Sequence[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """Returns the last step that has token weights, and its trained responses; (0, []) where there is none."""
    for record in reversed(steps):
        path = directory / "trajectories" / f"step_{record['step']:06d}.jsonl"
        if path.is_file() and (found := [one for one in _records(path) if one.get("token_weights")]):
            return record["step"], found
    return 0, []


def _examples(weighted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns responses to compare: of a prompt, one correct and one incorrect where it has both."""
    by_prompt: dict[str, dict[bool, dict[str, Any]]] = {}
    for record in weighted:
        if record.get("token_texts"):
            correct = Verdict(record["grade"]["verdict"]) is Verdict.CORRECT
            by_prompt.setdefault(record["prompt"]["id"], {}).setdefault(correct, record)
    chosen = sorted(by_prompt.values(), key=lambda sides: -len(sides))[:_NUM_EXAMPLES]
    return [_example([sides[correct] for correct in sorted(sides, reverse=True)]) for sides in chosen]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file of trajectories."""
    with path.open("rb") as file:
        yield from map(orjson.loads, file)


def _example(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the responses of a prompt, around the token where they part, and a plot of their confidence."""
    ids = [_policy_ids(record) for record in records]
    parting = next((t for t, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), 0)
    shown = slice(max(parting - _TOKENS_BEFORE, 0), parting + _TOKENS_AFTER)
    return {
        "question": records[0]["prompt"]["question"],
        "gold_answer": records[0]["prompt"]["gold_answer"],
        "parting": parting if len(records) > 1 else None,
        "sides": [_side(record, shown) for record in records],
        "course": _course_figure(records, parting) if all("token_scores" in record for record in records) else None,
    }


def _policy_ids(record: dict[str, Any]) -> list[int]:
    """Returns the response's token ids without inserted tokens, which have neither weights nor scores."""
    ids = list(record["response_ids"])
    for start, end in reversed(record.get("inserted_spans", ())):
        del ids[start:end]
    return ids


def _side(record: dict[str, Any], shown: slice) -> dict[str, Any]:
    correct = Verdict(record["grade"]["verdict"]) is Verdict.CORRECT
    hue = "46, 160, 67" if correct else "218, 54, 51"
    weights = record["token_weights"]
    strongest = max(1.0, *weights)
    tokens = [
        {"index": index, "text": text, "weight": weight, "colour": f"rgba({hue}, {0.85 * weight / strongest:.3f})"}
        for index, (text, weight) in enumerate(zip(record["token_texts"], weights, strict=True))
    ]
    return {
        "verdict": record["grade"]["verdict"],
        "advantage": record["advantage"],
        "tokens": tokens[shown],
        "num_before": shown.start,
        "num_after": max(len(tokens) - shown.stop, 0),
    }


def _course_figure(records: Sequence[dict[str, Any]], parting: int) -> str:
    """Plots the reward model's confidence that each response will be correct, token by token."""
    figure, axis = _panel("Confidence after each token", "token", "sigmoid of the mean score")
    for record in records:
        verdict, scores = record["grade"]["verdict"], record["token_scores"]
        means = (total / (t + 1) for t, total in enumerate(itertools.accumulate(scores)))
        points = [(float(t), 1 / (1 + math.exp(-mean))) for t, mean in enumerate(means)]
        every = -(-len(points) // _MOST_POINTS)
        _plot(axis, verdict, points[::every], 1, color=_COLOURS.get(verdict), marker="." if every == 1 else None)
    if len(records) > 1:
        axis.axvline(parting, color="0.7", linestyle="--", label="they part")
    axis.set_ylim(0, 1)
    axis.legend()
    return _svg(figure)


def _position_figure(step: int, weighted: Sequence[dict[str, Any]]) -> str | None:
    """Plots the mean token weight by position in the response."""
    if not weighted:
        return None
    figure, axis = _panel(f"Token weights of step {step}", "position in the response (%)", "mean weight")
    for verdict, colour in _COLOURS.items():
        totals, counts = [0.0] * _NUM_BINS, [0] * _NUM_BINS
        for record in weighted:
            weights = record["token_weights"] if record["grade"]["verdict"] == verdict else []
            for t, weight in enumerate(weights):
                bin = t * _NUM_BINS // len(weights)
                totals[bin] += weight
                counts[bin] += 1
        means = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        points = [(100 * (bin + 0.5) / _NUM_BINS, mean) for bin, mean in enumerate(means)]
        _plot(axis, verdict, points, 1, color=colour)
    axis.legend()
    return _svg(figure)


def _mean_seconds(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    # Phases in the order of a step; a step that trained both models has all of them.
    fullest: dict[str, float] = max((record["seconds"] for record in steps), key=len, default={})
    return {phase: sum(r["seconds"].get(phase, 0.0) for r in steps) / len(steps) for phase in fullest}


def _panel(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.6, 3.4), layout="constrained")
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axis


def _plot(axis: Any, label: str, points: Sequence[tuple[float, float | None]], factor: float, **style: Any) -> None:
    """Draws a line through the points that have a value, multiplied by `factor`."""
    known = [(x, factor * y) for x, y in points if y is not None]
    if known:
        axis.plot(*zip(*known, strict=True), label=label, **style)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
