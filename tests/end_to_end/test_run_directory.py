"""A run's directory takes one configuration, from the first thing that is made in it on."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import yaml

from tests.run_processes import RunProcess
from tests.tiny import invoke, metrics_of

pytestmark = pytest.mark.end_to_end

# What differs from the run that made the initial policy, and what a refusal must name of it.
OTHERS = {
    "seed": (("run.seed=1",), ("run.seed = 1", "made with 0")),
    "sft": (("sft.steps=10", "sft.optimizer.lr=0.02"), ("sft.steps = 10", "made with 150", "sft.optimizer.lr = 0.02")),
    "model": (("model.geometry.hidden_size=64",), ("model.geometry.hidden_size = 64", "made with 32")),
    "prompt": (("prompt.user='Solve: {question}'",), ("prompt.user = 'Solve: {question}'",)),
    "data": (("data.arithmetic.max_operand=12",), ("data.arithmetic.max_operand = 12", "made with 9")),
}
STOPPED = ("data.pass_rate={samples: 2, max_prompts: null}", "run.num_steps=0", "evaluation=none", "sft.steps=20",
           "rollout.batch_size=2")  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped while it estimated pass rates: it has an initial policy and a journal."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    process = RunProcess(directory, *STOPPED)
    assert process.wait_until(lambda: any((directory / "journal").glob("pass_rates_*")))
    process.signal(signal.SIGTERM)
    assert process.wait() == 75, process.said()
    assert "stopped while pass_rates_" in process.said() and "in the journal" in process.said()
    return directory


@pytest.fixture
def directory(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("run.seed=1",), ("run.seed = 1", "made with 0")),
        (("sft.steps=10", "sft.optimizer.lr=0.02"), ("sft.steps = 10", "made with 20", "sft.optimizer.lr = 0.02")),
        (("objective.beta=0.5",), ("objective.beta = 0.5",)),
    ],
    ids=["seed", "sft", "objective"],
)
@pytest.mark.parametrize("removed", [None, "config.yaml"])
def test_stopped_preparation_refuses_another_run(directory, changed, named, removed):
    if removed is not None:
        (directory / removed).unlink()
    refused = invoke(f"run.dir={directory}", *STOPPED, *changed)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert all(text in refused.stderr for text in named), refused.stderr
    assert "run.dir" in refused.stderr
    kept = directory / ("config.yaml" if removed is None else "journal/config.yaml")
    config = yaml.safe_load(kept.read_text())
    assert (config["run"]["seed"], config["sft"]["steps"]) == (0, 20)


def test_stopped_preparation_goes_on_with_the_same_command(directory):
    units = {path.name: path.read_text() for path in (directory / "journal").glob("pass_rates_*")}
    outcome = invoke(f"run.dir={directory}", *STOPPED)
    assert outcome.returncode == 0, outcome.stderr
    assert units and (directory / "pass_rates.jsonl").is_file()
    assert "warm start" not in outcome.stdout


@pytest.mark.parametrize("other", OTHERS)
def test_initial_policy_of_other_settings_is_refused(warm, other):
    changed, named = OTHERS[other]
    directory = warm()  # nothing but checkpoints/initial
    refused = invoke(f"run.dir={directory}", "run.num_steps=0", *changed)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert all(text in refused.stderr for text in (*named, "checkpoints/initial", "run.dir")), refused.stderr


def test_configuration_is_saved_before_anything_is_made(tmp_path):
    directory = tmp_path / "run"
    process = RunProcess(directory, "sft.steps=100000")
    assert process.wait_until(lambda: (directory / "config.yaml").is_file())
    assert not (directory / "checkpoints/initial").exists()
    refused = invoke(f"run.dir={directory}", "run.seed=1")  # while the first run is live
    assert refused.returncode == 1 and "Another run is live here: process" in refused.stderr, refused.stderr
    assert not process.is_over
    process.signal(signal.SIGTERM)
    assert process.wait() == 75 and "of the warm start" in process.said()
    # Nothing was made with that configuration, so another one may take the directory.
    outcome = invoke(f"run.dir={directory}", "run.num_steps=0", "sft.steps=2", "evaluation=none")
    assert outcome.returncode == 0, outcome.stderr
    assert yaml.safe_load((directory / "config.yaml").read_text())["sft"]["steps"] == 2


def test_run_of_version_0_1_0_goes_on(warm):
    """That version named no settings in checkpoints/initial, and kept no configuration in the journal."""
    schedules = ("optimizer.policy.decay_steps=4", "optimizer.reward_model.decay_steps=4")
    directory, whole = warm(), warm("whole")
    assert invoke(f"run.dir={directory}", "run.num_steps=1", *schedules).returncode == 0
    (directory / "journal/config.yaml").unlink()
    manifest = directory / "checkpoints/initial/manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("made_from")["run.seed"] == 0
    manifest.write_text(json.dumps(content))
    outcome = invoke(f"run.dir={directory}", "run.num_steps=2", *schedules)
    assert outcome.returncode == 0 and "resumed from checkpoint step_000001" in outcome.stdout, outcome.stderr
    assert invoke(f"run.dir={whole}", "run.num_steps=2", *schedules).returncode == 0
    steps = [[r for r in metrics_of(d) if r["kind"] == "step"] for d in (directory, whole)]
    assert steps[0] == steps[1]
