"""Draws a trace of tracking.timeline as a picture.

python tools/timeline_picture.py runs/NAME/timeline/steps_000001_000003.json timeline.svg
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

# Width of the picture, and height of a row of requests and of any other row, in inches.
_WIDTH, _REQUEST_HEIGHT, _HEIGHT = 11.0, 0.045, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="the trace, JSON")
    parser.add_argument("picture", type=Path, help="the picture to write, .svg or .png")
    arguments = parser.parse_args()
    draw(json.loads(arguments.trace.read_text())["traceEvents"], arguments.picture)


def draw(events: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture: a row for the phases of a rank and the states of a server, thin rows for requests."""
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    rows: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
    heights = {row: _REQUEST_HEIGHT if found[0]["cat"] == "request" else _HEIGHT for row, found in rows.items()}
    figure, axes = pyplot.subplots(figsize=(_WIDTH, sum(heights.values()) + 1.1), layout="constrained")
    colors: dict[str, Any] = {}
    palette = iter([*pyplot.colormaps["tab20"].colors, *pyplot.colormaps["tab20b"].colors])  # type: ignore[attr-defined]
    top, ticks = 0.0, {}
    for row in sorted(rows):
        for event in rows[row]:
            name = event["name"]
            if name.startswith("step ") and event["cat"] == "phase":  # the whole step: its border, not a bar
                axes.axvline(event["ts"] / 1e6, color="0.6", linewidth=0.6, zorder=0)
                axes.text(event["ts"] / 1e6, 0.06, f" {name}", fontsize=7, color="0.3", va="bottom")
                continue
            kind = f"request of {name.split()[0]}" if event["cat"] == "request" else name
            if kind not in colors:
                colors[kind] = next(palette)
            bar = (event["ts"] / 1e6, event["dur"] / 1e6)
            axes.broken_barh([bar], (top - heights[row], heights[row] * 0.9), color=colors[kind], linewidth=0)
        if heights[row] == _HEIGHT:
            ticks[top - _HEIGHT / 2] = names[row[0]].split(" at ")[0].split(" on ")[0]
        top -= heights[row]
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_xlabel("seconds")
    axes.set_ylim(top, 0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
