"""The documents: links, paths of files, and the page about metrics. `make docs` checks links as the site has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGE = ROOT / "oreal_megatron"
METRIC = re.compile(r"\"((?:rollout|reward|data|loss|policy|reward_model|publication|verifier|sft)/[a-z][a-z_0-9]*)\"")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_links_to_files_and_headings_that_exist(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_names_python_files_that_exist(page):
    """Paths of the package, such as `models/gpt.py`, may leave its name out."""
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists() and not (PACKAGE / path).exists()] == []


def test_metrics_page_has_every_metric_that_the_package_writes():
    page = (ROOT / "docs" / "metrics.md").read_text()
    written = {metric for path in PACKAGE.rglob("*.py") for metric in METRIC.findall(path.read_text())}
    assert len(written) > 25
    assert sorted(metric for metric in written if metric not in page) == []
