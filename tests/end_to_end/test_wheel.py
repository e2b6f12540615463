"""The project from its wheel: commands in a directory without a checkout, in an environment that has only the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from oreal_megatron import __version__
from tests.tiny import TINY
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., str]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Builds the wheel, installs it, and returns a function that runs its commands in an empty directory."""
    base = tmp_path_factory.mktemp("wheel")
    source, environment, directory = base / "source", base / "environment", base / "empty"
    source.mkdir()
    directory.mkdir()
    for name in ("oreal_megatron", "conf", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", base, source)
    venv.create(environment)
    pip("--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", *base.glob("*.whl"))
    # The requirements come from this environment. Path files in it, such as an editable installation's, are not read.
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(name: str, *arguments: object, status: int = 0, python_path: Path | None = None) -> str:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        outcome = subprocess.run(
            [environment / "bin" / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=directory,
            env=kept | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {}),
        )
        assert outcome.returncode == status, outcome.stdout + outcome.stderr
        return outcome.stdout + outcome.stderr

    return run


def test_wheel_is_what_runs(installed):
    code = "import oreal_megatron; print(oreal_megatron.__file__)"
    assert "environment" in installed("python", "-c", code) and str(ROOT) not in installed("python", "-c", code)
    assert __version__ in installed("oreal-plan", "--version")


def test_wheel_composes_a_run(installed):
    assert "experiment=arithmetic" in installed("oreal-train", "--help")
    assert "--benchmark" in installed("oreal-eval", "--help")
    assert "shaping: grpo" in installed("oreal-train", "objective=grpo", "--cfg", "job")
    assert "`objective`" in installed("oreal-train", "objektive=grpo", "--cfg", "job", status=1)


def test_wheel_converts_a_model_there_and_back(installed, tmp_path):
    model = save_tiny(tmp_path / "model", "qwen2", tied=False)
    assert "to-megatron" in installed("oreal-convert", "--help")
    installed("oreal-convert", "to-megatron", model, tmp_path / "megatron")
    installed("oreal-convert", "to-hf", tmp_path / "megatron", tmp_path / "back")
    assert "bit for bit" in installed("oreal-convert", "compare", tmp_path / "back", tmp_path / "megatron")


def test_wheel_verifies_answers(installed, tmp_path):
    pairs = [("\\frac{1}{2}", "0.5"), ("3", "4"), ("x+1", "1+x")]
    lines = [json.dumps({"gold": gold, "answer": answer, "kind": "pair"}) for gold, answer in pairs]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    installed("oreal-verify", tmp_path / "answers.jsonl", "--output", tmp_path / "verdicts.jsonl", "--num-workers", 1)
    verdicts = [json.loads(line)["verdict"] for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert verdicts == ["CORRECT", "INCORRECT", "CORRECT"]


def test_wheel_imports_a_data_set(installed, tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "1+1=2\n#### 2"}) + "\n")
    assert "GSM8K" in installed(
        "oreal-data", "import", tmp_path / "gsm8k.jsonl", "--output", tmp_path / "prompts.jsonl"
    )
    assert json.loads((tmp_path / "prompts.jsonl").read_text()) == {"question": "1+1?", "gold_answer": "2"}


def test_wheel_plans_32b(installed):
    assert "fits" in installed("oreal-plan", "experiment=oreal_32b")


def test_wheel_has_hydras_own_ways(installed, tmp_path, monkeypatch):
    """Own directories on the search path, information on them, and completion in a shell."""
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("defaults: [baseline]\npreset: mine\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    assert "preset: mine" in installed("oreal-train", search, "objective=mine", "--cfg", "job")
    assert "mine" in installed("oreal-train", search, "objective=mien", "--cfg", "job", status=1)
    found = installed("oreal-train", "--config-dir", tmp_path, "--info", "searchpath")
    assert str(tmp_path) in found and "oreal_megatron/conf" in found
    assert "experiment/arithmetic" in installed("oreal-train", "--info", "defaults")
    assert "complete -o nospace" in installed("oreal-train", "-sc", "install=bash")
    for line, offered in (("oreal-train objective=grp", "objective=grpo_epochs"), ("oreal-train run.se", "run.seed=")):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert offered in installed("oreal-train", "-sc", "query=bash")


def test_wheel_trains_an_objective_of_ones_own(installed, tmp_path):
    """The example is a directory outside the package; its objective passes its own tests and trains."""
    example = shutil.copytree(ROOT / "examples" / "own_objective", tmp_path / "example")
    tested = installed("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", example, python_path=example)
    assert "2 passed" in tested
    installed(
        "oreal-train", "--config-dir", example / "conf", *TINY, "objective=soft_clip", f"run.dir={tmp_path}/run",
        "run.num_steps=2", python_path=example,
    )  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if step["kind"] == "step" and step["skipped"] is None]
    message = installed("oreal-train", "objective.functions.kl=nowhere.kl", f"run.dir={tmp_path}/no", status=1)
    assert "objective.functions.kl = 'nowhere.kl': It cannot be imported" in message and "Traceback" not in message


def test_wheel_trains_with_a_reward_of_ones_own(installed, tmp_path):
    example = shutil.copytree(ROOT / "examples" / "own_reward", tmp_path / "example")
    tested = installed("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", example, python_path=example)
    assert "2 passed" in tested
    installed("python", example / "backwards.py", tmp_path / "data")
    installed(
        "oreal-train", "--config-dir", example / "conf", "experiment=backwards", f"run.dir={tmp_path}/run",
        f"data.train={tmp_path}/data/prompts.jsonl", f"sft.demonstrations={tmp_path}/data/demonstrations.jsonl",
        f"+evaluation.benchmarks.words={tmp_path}/data/heldout.jsonl", "run.num_steps=2", "sft.steps=40",
        "tracking.wandb=disabled", python_path=example,
    )  # fmt: skip
    lines = (tmp_path / "run" / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    grades = [json.loads(line)["grade"] for line in lines]
    assert {grade["stage"] for grade in grades} == {"reward"} and len({grade["credit"] for grade in grades}) > 2


def test_wheel_trains_with_a_tool(installed, tmp_path):
    example = shutil.copytree(ROOT / "examples" / "tool_use", tmp_path / "example")
    installed("python", example / "calculator.py", tmp_path / "data")
    installed(
        "oreal-train", "--config-dir", example / "conf", "experiment=tool_use", f"run.dir={tmp_path}/run",
        f"data.train={tmp_path}/data/prompts.jsonl", f"sft.demonstrations={tmp_path}/data/demonstrations.jsonl",
        f"+evaluation.benchmarks.calls={tmp_path}/data/heldout.jsonl", "run.num_steps=2", "sft.steps=100",
        "tracking.wandb=disabled", python_path=example,
    )  # fmt: skip
    lines = (tmp_path / "run" / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "inserted_spans" in record]
    assert len(records) > len(lines) / 2 and all("<|im_start|>tool" in record["text"] for record in records)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    differences = [step["metrics"]["policy/rollout_logprob_difference"] for step in steps if step["kind"] == "step"]
    assert len(differences) == 2 and max(differences) < 1e-4


def test_wheel_has_prompts_lengths_metrics_and_a_tracker_of_ones_own(installed, tmp_path):
    example = shutil.copytree(ROOT / "examples" / "own_parts", tmp_path / "example")
    shots = "{path: parts.messages, settings: {examples: [[Compute 1+1., '2']]}}"
    installed(
        "oreal-train", *TINY, f"prompt.function={shots}", "prompt.max_prompt_tokens=100",
        "model.max_sequence_length=160", "+evaluation.functions.lines=parts.lines",
        "tracking.function=parts.write_line",
        "rollout.sampling.function={path: parts.growing, settings: {first: 2, each_step: 1}}", "run.num_steps=2",
        f"run.dir={tmp_path}/run", python_path=example,
    )  # fmt: skip
    written = (tmp_path / "run" / "progress.txt").read_text().splitlines()
    assert [line.split(" {")[0] for line in written] == ["evaluation 0", "step 0", "step 1", "evaluation 2"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["metrics"]["heldout/lines"] >= 1 for r in records if r["kind"] == "evaluation")
    steps = [r["metrics"] for r in records if r["kind"] == "step"]
    assert all(1 < metrics["rollout/response_tokens"] <= limit for metrics, limit in zip(steps, (2, 3), strict=True))
