"""`oreal-verify`: files in, files out, and errors that name the line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from oreal_megatron.cli.verify import main
from oreal_megatron.verifier import VerifierConfig

ROOT = Path(__file__).resolve().parents[3]


def exit_status(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path: Path, rows: list[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert exit_status([str(source), "--output", str(output), "--num-workers", "1", *options]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_example_of_the_help(tmp_path: Path) -> None:
    """The command lines printed by --help work as they stand."""
    tool = [sys.executable, str(ROOT / "tools" / "verify_answers.py")]
    text = subprocess.run([*tool, "--help"], capture_output=True, text=True, check=True).stdout
    example = text.split("example:")[1].replace("oreal-verify", " ".join(tool))
    subprocess.run(["bash", "-ec", example], cwd=tmp_path, check=True)
    verdict = json.loads((tmp_path / "verdicts.jsonl").read_text())
    assert (verdict["id"], verdict["verdict"]) == ("a", "CORRECT")
    assert set(verdict) == {"id", "verdict", "reason", "stage", "seconds"}


def test_rows_keep_their_order(tmp_path: Path) -> None:
    rows = [{"id": n, "gold": str(n), "answer": str(n + n % 2), "kind": "pair"} for n in range(600)]
    rows.insert(300, {"id": "r", "gold": "\\sqrt{2}", "answer": "so \\boxed{2^{1/2}}", "kind": "response"})
    results = run(tmp_path, rows)
    assert [result["id"] for result in results] == [row["id"] for row in rows]
    assert results[300]["verdict"] == "CORRECT"
    assert [r["verdict"] for r in results[:4]] == ["CORRECT", "INCORRECT", "CORRECT", "INCORRECT"]


def test_the_stop_token_matters_where_the_file_holds_it(tmp_path: Path) -> None:
    stopped = {"id": 1, "gold": "4", "answer": "\\boxed{4}<|im_end|>"}
    cut = {"id": 2, "gold": "4", "answer": "\\boxed{4}"}
    assert [r["verdict"] for r in run(tmp_path, [stopped, cut])] == ["CORRECT", "INCORRECT"]
    assert [r["verdict"] for r in run(tmp_path, [cut])] == ["CORRECT"]
    assert [r["verdict"] for r in run(tmp_path, [{**cut, "stopped": False}])] == ["INCORRECT"]
    with_newline = {"id": 3, "gold": "4", "answer": "\\boxed{4}<|im_end|>\n"}
    assert [r["verdict"] for r in run(tmp_path, [with_newline, cut])] == ["CORRECT", "INCORRECT"]
    other = [{"id": 1, "gold": "4", "answer": "\\boxed{4}</s>"}, cut]
    assert [r["verdict"] for r in run(tmp_path, other, "--stop-token", "</s>")] == ["CORRECT", "INCORRECT"]


def test_the_summary_scores_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"gold": "1", "answer": "1", "kind": "pair", "label": 1},
        {"gold": "1", "answer": "2", "kind": "pair", "label": 1},
        {"gold": "1", "answer": "1", "kind": "pair", "label": 0},
        {"gold": "1", "answer": "2", "kind": "pair", "label": 0},
    ]
    run(tmp_path, rows)
    assert "0.5000: 1 false positives, 1 false negatives" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:2"),
        ("[]", "not a JSON object"),
        ('{"gold": "1"}', '"answer"'),
        ('{"gold": 1, "answer": "1"}', '"gold"'),
        ('{"gold": "1", "answer": "1", "kind": "x"}', "\"kind\" is 'x'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"gold": "1", "answer": "1"}\n' + line + "\n")
    assert exit_status([str(source), "--output", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout-seconds", "0"], "timeout_seconds = 0.0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_bad_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = write(tmp_path / "in.jsonl", [])
    assert exit_status([str(source), "--output", str(tmp_path / "out.jsonl"), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rules", "rules_and_judge"])
def test_config_files_hold_every_key_and_validate(name: str) -> None:
    loaded = yaml.safe_load((ROOT / "conf" / "verifier" / f"{name}.yaml").read_text())
    config = VerifierConfig.model_validate(loaded)
    assert set(loaded) == set(VerifierConfig.model_fields)
    assert set(loaded["judge"]) == set(type(config.judge).model_fields)
    if name == "rules":
        assert config == VerifierConfig()


def test_every_field_of_the_config_is_described() -> None:
    for model in (VerifierConfig, type(VerifierConfig().judge)):
        assert all(field.description for field in model.model_fields.values())
