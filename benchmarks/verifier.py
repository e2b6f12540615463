"""The verifier and math-verify, used plainly, on the same cases, on one core, in one run.

    python benchmarks/verifier.py [--cases DIR] [--repeat N]

Prints, for each file of labelled cases and for each kind of fault in the cases of this repository, accuracy, false
positives and false negatives of both; then verifications a second on one core, p50 and p99, and the limits for them.
The exit code is 1 if a limit is missed.
Needs math-verify (pip install math-verify) and a directory of labelled cases: --cases, or verifier_cases
below OREAL_SHARED_DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from oreal_megatron.types import Grade, Verdict  # noqa: E402
from oreal_megatron.verifier import VerifierConfig, build_verifier  # noqa: E402
from oreal_megatron.verifier.grade_file import Row, grade_rows, read_rows  # noqa: E402

MIN_RATIO = 4.0
MIN_PER_SECOND = 250.0
MAX_P99_SECONDS = 0.060
KINDS = ROOT / "tests" / "unit" / "verifier" / "cases" / "kinds.jsonl"
STOP_TOKEN = "<|im_end|>"
BATCH = 64


@dataclass
class Result:
    """Verdicts and wall seconds of a grader over a file."""

    verdicts: list[bool | None]
    seconds: list[float]
    total: float


def labelled_core(path: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of a file that rules alone can decide."""
    fields = [json.loads(line) for line in path.open()]
    rows = list(read_rows(path, STOP_TOKEN))
    # Of the public cases the tiers other than core need the question, a tolerance, or world knowledge.
    keep = [index for index, case in enumerate(fields) if path.stem != "public" or case["tier"] == "core"]
    return [rows[index] for index in keep], [fields[index] for index in keep]


def run_ours(rows: list[Row], timeout: float) -> Result:
    """Uses a single worker, so that parent and worker share a core."""
    with build_verifier(VerifierConfig(num_workers=1, timeout_seconds=timeout)) as verifier:
        verifier.grade_answers([Row(0, _request("\\sqrt{2}", "2^{1/2}"), False, None).request])  # start the processes
        grades: list[Grade] = []
        started = time.perf_counter()
        for start in range(0, len(rows), BATCH):
            grades += grade_rows(verifier, rows[start : start + BATCH])
        total = time.perf_counter() - started
    verdicts = [None if grade.verdict is Verdict.UNDECIDED else grade.verdict is Verdict.CORRECT for grade in grades]
    return Result(verdicts, [grade.seconds for grade in grades], total)


def _request(gold: str, answer: str):  # type: ignore[no-untyped-def]
    from oreal_megatron.types import GradeRequest

    return GradeRequest(question="", gold_answer=gold, response=answer, stopped=True)


def run_math_verify(rows: list[Row]) -> Result:
    """`verify(parse(gold), parse(answer))`, its own five-second limits left on."""
    from math_verify import parse, verify

    verify(parse("$\\sqrt{2}$"), parse("\\boxed{2^{1/2}}"))
    verdicts: list[bool | None] = []
    seconds = []
    for row in rows:
        started = time.perf_counter()
        answer = row.request.response if row.is_response else f"\\boxed{{{row.request.response}}}"
        try:
            verdicts.append(bool(verify(parse(f"${row.request.gold_answer}$"), parse(answer))))
        except Exception:
            verdicts.append(None)
        seconds.append(time.perf_counter() - started)
    return Result(verdicts, seconds, sum(seconds))


def scores(result: Result, cases: list[dict[str, Any]]) -> str:
    """accuracy, false positives/negative cases, false negatives/positive cases."""
    pairs = list(zip(result.verdicts, (bool(case["label"]) for case in cases), strict=True))
    right = sum(verdict is label for verdict, label in pairs)
    false_positives = sum(verdict is True and not label for verdict, label in pairs)
    false_negatives = sum(verdict is not True and label for verdict, label in pairs)
    positives = sum(label for _, label in pairs)
    return f"{right / len(pairs):.4f}, {false_positives}/{len(pairs) - positives}, {false_negatives}/{positives}"


def percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("OREAL_SHARED_DIR", ROOT.parent / "shared"))
    parser.add_argument("--cases", type=Path, default=shared / "verifier_cases", help="directory of labelled cases")
    parser.add_argument("--repeat", type=int, default=3, help="runs of the speed part; the median counts (default: 3)")
    parser.add_argument("--speed-only", action="store_true", help="leave out the accuracy table")
    arguments = parser.parse_args()
    if not arguments.cases.is_dir():
        print(f"no labelled cases at {arguments.cases}: set OREAL_SHARED_DIR or give --cases", file=sys.stderr)
        return 2
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # children inherit it: everything on one core

    if not arguments.speed_only:
        compare_accuracy(arguments.cases)
        compare_kinds()
    return speed(arguments)


def compare_accuracy(directory: Path) -> None:
    """The table of docs/verifier.md."""
    print("| cases | n | this verifier | math-verify |\n|---|---|---|---|")
    for name in ("hard", "public", "e2e", "mutations", "reports"):
        rows, cases = labelled_core(directory / f"{name}.jsonl")
        ours, theirs = run_ours(rows, 2.0), run_math_verify(rows)
        print(f"| {name} | {len(rows)} | {scores(ours, cases)} | {scores(theirs, cases)} |", flush=True)


def compare_kinds() -> None:
    """Prints the table of docs/verifier.md by kind of fault."""
    print("\n| kind | n | this verifier | math-verify |\n|---|---|---|---|")
    rows, cases = labelled_core(KINDS)
    ours, theirs = run_ours(rows, 2.0), run_math_verify(rows)
    kinds = dict.fromkeys(case["category"] for case in cases)
    for kind in (*kinds, "all"):
        chosen = [index for index, case in enumerate(cases) if kind in ("all", case["category"])]
        some = [cases[index] for index in chosen]
        texts = [scores(Result([result.verdicts[i] for i in chosen], [], 0.0), some) for result in (ours, theirs)]
        print(f"| {kind} | {len(some)} | {texts[0]} | {texts[1]} |", flush=True)


def speed(arguments: argparse.Namespace) -> int:
    """Real outputs: the public core cases."""
    rows, _ = labelled_core(arguments.cases / "public.jsonl")
    runs = sorted(
        ((run_ours(rows, 2.0), run_math_verify(rows)) for _ in range(arguments.repeat)), key=lambda pair: pair[0].total
    )
    ours, theirs = runs[len(runs) // 2]
    rate, their_rate = len(rows) / ours.total, len(rows) / theirs.total
    p99 = percentile(ours.seconds, 0.99)
    print(f"\nverifications/s on one core, {len(rows)} public cases: {rate:.0f}, math-verify {their_rate:.0f}")
    for label, result in (("this verifier", ours), ("math-verify", theirs)):
        p50_ms, p99_ms = 1e3 * percentile(result.seconds, 0.5), 1e3 * percentile(result.seconds, 0.99)
        print(f"{label}: p50 {p50_ms:.2f} ms, p99 {p99_ms:.1f} ms, slowest {1e3 * max(result.seconds):.0f} ms")
    checks = (
        (f"ratio {rate / their_rate:.1f} (limit: at least {MIN_RATIO:g})", rate >= MIN_RATIO * their_rate),
        (f"rate {rate:.0f}/s (limit: at least {MIN_PER_SECOND:g}/s)", rate >= MIN_PER_SECOND),
        (f"p99 {1e3 * p99:.1f} ms (limit: at most {1e3 * MAX_P99_SECONDS:g} ms)", p99 <= MAX_P99_SECONDS),
    )
    for text, passed in checks:
        print(f"{'ok' if passed else 'MISSED'}: {text}")
    return 0 if all(passed for _, passed in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
