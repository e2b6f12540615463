"""Token weights compared on equal terms: same warm starts and settings, one pair a group; only the weights differ.

    python -m benchmarks.token_weights [--task arithmetic] [--steps 30] [--seeds 0 1 2 3 4] [--arms ones oracle ...]

Prints a Markdown table with differences from weights of one, paired by seed, and writes it with a figure to
results.html, and as results.md and results.json. Finished runs are read, not run again: the command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from benchmarks.objectives import begin_from, run
from oreal_megatron.config import TokenWeightConfig
from oreal_megatron.data.arithmetic import worked_solution
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from oreal_megatron.losses.token_weights import token_weights
from oreal_megatron.metrics import read_metrics

SCORES = ("greedy_pass@1", "avg@4")
AUC = "reward_model_auc_within_prompts"
WEIGHTS = "objective.token_weights"
FUNCTION = "objective.functions.token_weights"
EVERYTHING = ("objective.reward_model.responses=all", "objective.reward_model.updates=4")
CHANGE = (f"{WEIGHTS}.form=change", f"{WEIGHTS}.normalize=mean")
DEPARTURE = (f"{WEIGHTS}.form=departure", f"{WEIGHTS}.normalize=mean")
# Arms: overrides of objective=oreal. The first five are the paper's and what bounds them; the others are options that
# are not the paper's.
ARMS: dict[str, tuple[str, ...]] = {
    "ones": (f"{WEIGHTS}.source=ones",),
    "shuffled": (f"{FUNCTION}=benchmarks.token_weights.shuffled",),
    "predictor": (f"{WEIGHTS}.alignment=predictor",),
    "inclusive": (),
    "oracle": (f"{FUNCTION}=benchmarks.token_weights.oracle",),
    "oracle, both": (f"{FUNCTION}=benchmarks.token_weights.oracle_of_both",),
    "change": CHANGE,
    # Controls: the same weights at random places, and a weight that reads no score.
    "change, shuffled": (*CHANGE, f"{FUNCTION}=benchmarks.token_weights.shuffled"),
    "first token": (f"{FUNCTION}=benchmarks.token_weights.first_token",),
    "change, floor 0.5": (*CHANGE, f"{WEIGHTS}.floor=0.5"),
    "departure": DEPARTURE,
    "departure, floor 0.5": (*DEPARTURE, f"{WEIGHTS}.floor=0.5"),
    "top share 0.2": (f"{WEIGHTS}.top_share=0.2",),
    "change, all responses": (*CHANGE, *EVERYTHING),
    "change, all, ranking": (*CHANGE, *EVERYTHING, "objective.reward_model.ranking_weight=1.0"),
}
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Token weights: {{ task }}</title>
<style>body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d1d9e0; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; }</style></head><body>
<h1>Token weights on {{ task }}</h1>
<p>{{ steps }} steps, seeds {{ seeds|join(", ") }}. Differences from weights of one are paired by seed, with 95%
bootstrap intervals over seeds.</p>
{{ figure|safe }}
<table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></body></html>
"""
HEAD = ("weights", "greedy pass@1", "minus ones [95%]", "avg@4", "minus ones [95%]", "AUC within prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["arithmetic", "arithmetic_order"], default="arithmetic", help="experiment")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--directory", type=Path, help="default: runs/token_weights/TASK")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all runs alike")
    arguments = parser.parse_args()
    directory = arguments.directory or Path("runs/token_weights") / arguments.task
    shared = [f"run.num_steps={arguments.steps}", "run.checkpoint_every=0", "evaluation.every=0", *arguments.overrides]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
    for seed in arguments.seeds:
        start = directory / f"start_{seed}"
        run("oreal", seed, start, [*shared, "run.num_steps=0"], experiment=arguments.task)
        for arm in arguments.arms:
            place = directory / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
            begin_from(start, place)
            run("oreal", seed, place, [*shared, *ARMS[arm]], experiment=arguments.task)
            metrics = read_metrics(place)[1][-1]["metrics"]
            found[arm].append({name.removeprefix("heldout/"): value for name, value in metrics.items()})
            print(f"seed {seed}  {arm:24} {found[arm][-1][SCORES[0]]:.3f}", flush=True)
    rows = table(found)
    text = "\n".join("| " + " | ".join(row) + " |" for row in (HEAD, ["---"] * len(HEAD), *rows))
    (directory / "results.md").write_text(text + "\n")
    (directory / "results.json").write_text(json.dumps({"seeds": arguments.seeds, "arms": found}, indent=1))
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    (directory / "results.html").write_text(
        page.render(
            task=arguments.task,
            steps=arguments.steps,
            seeds=arguments.seeds,
            figure=figure(found),
            head=HEAD,
            rows=rows,
        )
    )
    print(f"{text}\n\n{directory / 'results.html'}")


def differences(found: Mapping[str, Sequence[Mapping[str, float]]], arm: str, score: str) -> np.ndarray:
    """Returns an arm's score minus that of weights of one, in points, by seed."""
    return np.array([100 * (a[score] - b[score]) for a, b in zip(found[arm], found["ones"], strict=True)])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of the mean."""
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    rows = []
    for arm, metrics in found.items():
        cells = [f"`{arm}`"]
        for score in SCORES:
            cells.append(f"{100 * statistics.mean(m[score] for m in metrics):.1f}")
            if arm == "ones" or "ones" not in found:
                cells.append("")
            else:
                values = differences(found, arm, score)
                low, high = interval(values)
                cells.append(f"{values.mean():+.1f} [{low:+.1f}, {high:+.1f}]")
        aucs = [m[AUC] for m in metrics if m.get(AUC) is not None]
        rows.append([*cells, f"{statistics.mean(aucs):.2f}" if aucs else ""])
    return rows


def figure(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Returns an SVG of the differences in greedy pass@1: each seed, the mean and its interval."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    arms = [arm for arm in found if arm != "ones" and "ones" in found]
    drawn, axis = pyplot.subplots(figsize=(8, 1 + 0.4 * len(arms)), layout="constrained")
    for place, arm in enumerate(reversed(arms)):
        values = differences(found, arm, SCORES[0])
        low, high = interval(values)
        axis.plot(values, [place] * len(values), "o", color="0.7")
        axis.errorbar(
            values.mean(), place, xerr=[[values.mean() - low], [high - values.mean()]], fmt="s", color="tab:blue"
        )
    axis.axvline(0.0, color="0.5", linestyle="--")
    axis.set(
        yticks=range(len(arms)), yticklabels=list(reversed(arms)), xlabel="greedy pass@1 minus weights of one (points)"
    )
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def shuffled(
    scores_T: Tensor, *, correct: bool, config: TokenWeightConfig, prompt_ids: Tensor, response_ids: Tensor
) -> Tensor:
    """Weighs with the weights of `config` in a random order, which the response alone decides."""
    seed = zlib.crc32(response_ids.cpu().numpy().tobytes())
    order = torch.randperm(len(scores_T), generator=torch.Generator().manual_seed(seed)).to(scores_T.device)
    return token_weights(scores_T, correct=correct, config=config)[order]


def first_token(
    scores_T: Tensor, *, correct: bool, config: TokenWeightConfig, prompt_ids: Tensor, response_ids: Tensor
) -> Tensor:
    """Gives all weight to the first token, with the mean 1 over the response."""
    return torch.nn.functional.one_hot(torch.tensor(0, device=scores_T.device), len(scores_T)).float() * len(scores_T)


def oracle(
    scores_T: Tensor, *, correct: bool, config: TokenWeightConfig, prompt_ids: Tensor, response_ids: Tensor
) -> Tensor:
    """Gives weight 1 to every token of a correct response, and to the first wrong token of an incorrect one.

    A token is wrong that is not the worked solution's.
    """
    if correct:
        return torch.ones_like(scores_T)
    right, ids = _solution(tuple(prompt_ids.tolist())), response_ids.tolist()
    first = next((i for i, id in enumerate(ids) if i >= len(right) or id != right[i]), len(ids) - 1)
    weights_T = torch.zeros_like(scores_T)
    weights_T[first] = 1.0
    return weights_T


def oracle_of_both(
    scores_T: Tensor, *, correct: bool, config: TokenWeightConfig, prompt_ids: Tensor, response_ids: Tensor
) -> Tensor:
    """Weighs as `oracle`, and of a correct response those tokens alone that are the worked solution's."""
    if not correct:
        return oracle(scores_T, correct=correct, config=config, prompt_ids=prompt_ids, response_ids=response_ids)
    right, ids = _solution(tuple(prompt_ids.tolist())), response_ids.tolist()
    same = [i < len(right) and id == right[i] for i, id in enumerate(ids)]
    return torch.tensor(same, dtype=torch.float32, device=scores_T.device).cumprod(0)


@functools.cache
def _tokenizer() -> Any:
    return arithmetic_tokenizer()


@functools.lru_cache(4096)
def _solution(prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the token ids of the worked solution of a prompt, without a stop token."""
    expression = _tokenizer().decode(prompt_ids).rpartition("Compute ")[2].partition(".")[0]
    return tuple(_tokenizer().encode(worked_solution(expression)))


if __name__ == "__main__":
    main()
