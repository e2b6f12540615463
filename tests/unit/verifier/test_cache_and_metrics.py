"""The verdict cache on disk, and the counters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron.types import Grade, GradeRequest, Verdict
from oreal_megatron.verifier import JudgeConfig, VerifierConfig, build_verifier, cache
from oreal_megatron.verifier.cache import VerdictCache, cache_key
from oreal_megatron.verifier.metrics import VerifierMetrics

from .judge_server import JudgeServer, says
from .labelled import pair
from .test_judge import NEEDS_JUDGE

SURDS = [pair(f"\\sqrt{{{n}}}", f"{n}^{{1/2}}") for n in range(2, 12)] + [pair("\\sqrt{2}", "\\sqrt{3}")]
BOMB = pair("x", "9^{9^{9^{9}}}")


def test_decided_verdicts_are_remembered_and_undecided_ones_are_not(tmp_path: Path) -> None:
    config = VerifierConfig(num_workers=1, cache_path=str(tmp_path / "deep" / "verdicts.sqlite"))
    with build_verifier(config) as verifier:
        first = verifier.grade_answers([*SURDS, BOMB])
        assert verifier.drain_metrics()["verifier/num_cache_hits"] == 0
    with build_verifier(config) as verifier:
        second = verifier.grade_answers([*SURDS, BOMB])
        assert verifier.drain_metrics()["verifier/num_cache_hits"] == len(SURDS)
    assert [(g.verdict, g.reason, g.stage) for g in first] == [(g.verdict, g.reason, g.stage) for g in second]
    assert second[-1].verdict is Verdict.UNDECIDED


def test_judged_verdicts_are_remembered_by_question_and_model(tmp_path: Path) -> None:
    with JudgeServer(says("CORRECT")) as server:
        judge = JudgeConfig(mode="undecided", endpoints=(server.url,), model="a")
        config = VerifierConfig(num_workers=1, cache_path=str(tmp_path / "v.sqlite"), judge=judge)
        other_model = config.model_copy(update={"judge": judge.model_copy(update={"model": "b"})})
        other_question = GradeRequest(
            question="Why?", gold_answer=NEEDS_JUDGE.gold_answer, response=NEEDS_JUDGE.response, stopped=True
        )
        for settings, request, num_requests in (
            (config, NEEDS_JUDGE, 1), (config, NEEDS_JUDGE, 1), (config, other_question, 2),
            (other_model, NEEDS_JUDGE, 3),
        ):  # fmt: skip
            with build_verifier(settings) as verifier:
                assert verifier.grade([request])[0].verdict is Verdict.CORRECT
            assert len(server.requests) == num_requests


def test_keys_differ_with_every_part() -> None:
    keys = {
        cache_key("a", ("b", "c")),
        cache_key("a", ("b",), "c"),
        cache_key("a", ("bc",)),
        cache_key("a\ud800", ("b", "c")),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("content", [b"this is no database" * 100, None], ids=["corrupt", "directory"])
def test_a_broken_cache_does_not_stop_grading(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "verdicts.sqlite"
    path.mkdir() if content is None else path.write_bytes(content)
    with build_verifier(VerifierConfig(num_workers=1, cache_path=str(path))) as verifier:
        assert verifier.grade_answers(SURDS)[0].verdict is Verdict.CORRECT


def test_code_digest_covers_every_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change to any file of the verifier makes cached verdicts stale."""
    (tmp_path / "latex").mkdir()
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    digests = set()
    for source in ("a = 1", "a = 2"):
        (tmp_path / "latex" / "rational.py").write_text(source)
        cache.code_digest.cache_clear()
        digests.add(cache.code_digest())
    cache.code_digest.cache_clear()
    assert len(digests) == 2


_WRITER = """
import sys
from oreal_megatron.types import Verdict
from oreal_megatron.verifier.cache import VerdictCache, cache_key
from oreal_megatron.verifier.outcome import Outcome
path, first = sys.argv[1], int(sys.argv[2])
verdicts = VerdictCache(path)
for number in range(first, first + 50):
    verdicts.put({cache_key(number): Outcome(Verdict.CORRECT, "r")})
verdicts.close()
"""


def test_processes_share_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "verdicts.sqlite")
    root = str(Path(__file__).resolve().parents[3])
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, path, str(50 * index)], env={**os.environ, "PYTHONPATH": root})
        for index in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(VerdictCache(path).get([cache_key(number) for number in range(150)])) == 150


def test_metrics_by_hand() -> None:
    metrics = VerifierMetrics()
    metrics.record(
        [
            Grade(verdict=Verdict.CORRECT, reason="", stage="rules", seconds=0.1),
            Grade(verdict=Verdict.INCORRECT, reason="", stage="stop", seconds=0.0),
            Grade(verdict=Verdict.INCORRECT, reason="", stage="rules", seconds=0.2),
            Grade(verdict=Verdict.UNDECIDED, reason="", stage="judge", seconds=0.5),
        ]
    )
    metrics.count("judge_upheld", 3)
    metrics.count("judge_overturned")
    drained = metrics.drain()
    assert drained["verifier/num_graded"] == 4
    assert drained["verifier/share_correct"] == 0.25
    assert drained["verifier/share_incorrect"] == 0.5
    assert drained["verifier/num_undecided"] == 1
    assert drained["verifier/share_by_rules"] == 0.5
    assert drained["verifier/judge_agreement"] == 0.75
    assert drained["verifier/seconds_mean"] == pytest.approx(0.2)
    assert drained["verifier/seconds_p99"] == 0.5
    assert metrics.drain()["verifier/num_graded"] == 0
