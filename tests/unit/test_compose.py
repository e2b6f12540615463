"""Composition: what a command line with a mistake says, options from outside, and the experiment for own models."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from oreal_megatron.cli import plan, train
from oreal_megatron.cli.planning import planned_config
from oreal_megatron.compose import composed, missing_keys, resolved, validated
from oreal_megatron.config import ConfigError, Violation, parse_config
from tests.conftest import ROOT

OWN = ["model.path=DIR", "data.train=train.jsonl"]


def refused(*overrides, **options) -> list[Violation]:
    with pytest.raises(ConfigError) as caught:
        validated(composed(overrides, **options))
    return caught.value.violations


def test_own_model_has_its_own_lengths_name_and_evaluation():
    config = validated(composed(["experiment=own_model", *OWN, "+evaluation.benchmarks.math500=test.jsonl"]))
    assert (config.run.name, config.run.dir) == ("own_model", "runs/own_model")
    assert config.prompt.max_prompt_tokens == 1024 and config.rollout.sampling.max_new_tokens == 3072
    assert [(name, it.path, it.samples) for name, it in config.evaluation.benchmarks.items()] == [
        ("math500", "test.jsonl", 0)
    ]
    assert config.data.arithmetic is None
    assert config.optimizer.policy.lr == 5e-7 and config.sft is None


def test_own_model_asks_for_all_that_only_its_user_knows():
    found = {violation.key: violation.remedy for violation in refused("experiment=own_model")}
    assert found.keys() == {"model.path", "data.train", "evaluation.benchmarks"}
    assert (
        "+evaluation.benchmarks.NAME=FILE, a JSONL file with question and gold_answer" in found["evaluation.benchmarks"]
    )


@pytest.mark.parametrize("more", [[], ["data=jsonl", "evaluation=none"], ["experiment=arithmetic_sglang"]])
def test_demo_is_refused_for_another_model_and_data(more):
    (violation,) = refused("model=huggingface", "sft=none", *OWN, *more)
    assert violation.key == "experiment" and "experiment=own_model" in violation.remedy


@pytest.mark.parametrize("value", ["<|im_end|>", "a,b=c", 'say "x"', "back\\slash\\", "{question}", "<|a|> $b 'c'"])
def test_unreadable_value_is_shown_with_the_quotes_that_make_it_readable(value):
    try:
        assert composed([f"prompt.stop_token={value}"]).prompt.stop_token == value  # Hydra reads it as it is
        return
    except ConfigError as error:
        (violation,) = error.violations
    assert (violation.key, violation.value) == ("prompt.stop_token", value)
    (override,) = shlex.split(violation.remedy.split("Write ")[1].removesuffix("."))
    assert composed([override]).prompt.stop_token == value


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("run.seed", "run.seed", "Write run.seed=VALUE"),
        ("+evaluation.benchmarks.a/b=1", "+evaluation.benchmarks.a/b", "below --config-dir"),
        ("~objektive", "~objektive", "`objective`"),
        ("+objektive=grpo", "objektive", "`objective`"),
        ("verifier=rules,rulez", "verifier", "no such option. Did you mean `rules`"),
        ("verifier=rulez", "verifier", "no such option. Did you mean `rules`"),
    ],
)
def test_override_that_fits_nothing_names_the_nearest(override, key, words):
    (violation,) = refused(override)
    assert violation.key == key and words in violation.remedy


def test_texts_that_no_file_can_hold_and_numbers_beyond_64_bits_are_refused():
    wrong = {
        "run.dir": "",
        "run.name": "a\0b",
        "model.tokenizer": "a\nb",
        "data.train": "\udc80.jsonl",
        "run.seed": 2**63,
        "evaluation.benchmarks.a b.path": " ",
        "optimizer.policy.betas.0": 1.0,
    }
    raw = resolved(composed([]))
    raw["run"] |= {"dir": "", "name": "a\0b", "seed": 2**63}
    raw["data"]["train"] = "\udc80.jsonl"
    raw["model"]["tokenizer"] = "a\nb"
    raw["optimizer"]["policy"]["betas"] = [1.0, 0.9]
    raw["evaluation"]["benchmarks"]["a b"] = {"path": " ", "samples": 0, "limit": None}
    raw["evaluation"]["benchmarks"]["../a"] = raw["evaluation"]["benchmarks"]["heldout"]
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    found = {violation.key: violation.value for violation in caught.value.violations}
    assert found.pop("evaluation.benchmarks.../a.[key]") == "../a" and found == wrong


@pytest.fixture
def config_dir(tmp_path):
    directory = tmp_path / "my options"
    (directory / "objective").mkdir(parents=True)
    (directory / "objective" / "mine.yaml").write_text("defaults: [baseline]\npreset: mine\neta: 0.25\n")
    return directory


def test_options_from_outside_compose_and_are_suggested(config_dir):
    config = validated(composed(["objective=mine"], config_dir=config_dir))
    assert (config.objective.preset, config.objective.eta, config.objective.keep_groups) == ("mine", 0.25, "all")
    (violation,) = refused("objective=min", config_dir=config_dir)
    assert "`mine`" in violation.remedy
    (violation,) = refused("objective=mine", config_dir=config_dir / "nowhere")
    assert violation.key == "--config-dir"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"preset: {a: ???}\n", "mine.yaml"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"defaults: 3", "defaults must be a list"),
        (b"defaults: [nope]", "objective/nope"),
        (b"defaults: [mine]", "recursion"),
        (b"3", "int"),
    ],
)
def test_file_that_is_no_option_is_one_message(capsys, config_dir, content, monkeypatch, words):
    (config_dir / "objective" / "mine.yaml").write_bytes(content)
    (violation,) = refused("objective=mine", config_dir=config_dir)
    assert words in violation.remedy
    assert ended(train.main, monkeypatch, "--config-dir", config_dir, "objective=mine") == 1
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def ended(main, monkeypatch, *arguments) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restored at the end, since oreal-train sets it
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def run(command: str, *arguments) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own: a plan makes process groups, which another test's process may have."""
    module = f"oreal_megatron.cli.{command}"
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)


def test_commands_take_options_from_outside(capsys, config_dir, monkeypatch):
    assert ended(train.main, monkeypatch, "--config-dir", config_dir, "objective=mine", "--cfg", "job") in (0, None)
    assert "eta: 0.25" in capsys.readouterr().out
    assert run("plan", "--config-dir", config_dir, "objective=mine").returncode == 0
    assert ended(train.main, monkeypatch, "--config-dir", config_dir, "objective=min") == 1
    assert "`mine`" in capsys.readouterr().err
    assert ended(plan.main, monkeypatch, "experiment=own_model") == 1  # before anything is built
    assert "model.path = '???': A plan reads its config.json" in capsys.readouterr().err


def test_job_gets_the_options_from_outside(config_dir, monkeypatch, tmp_path):
    # In the place of SLURM: numbers jobs.
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\n[ "$1" = --test-only ] || {{ echo >>{tmp_path}/jobs; wc -l <{tmp_path}/jobs; }}\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    site = ["cluster=single_machine_test", f"cluster.runs={tmp_path}", "resources.trainer_devices=1"]
    submit = ["submit", "--config-dir", config_dir, *site, "objective=mine", f"run.dir={tmp_path}/run"]
    assert run(*submit, "--test-only").returncode == 0
    assert not (tmp_path / "run").exists()
    submitted = run(*submit, "--chain=2")
    assert submitted.returncode == 0
    assert "/job-1.log" in submitted.stdout and "--signal=TERM 1 " in submitted.stdout  # the job that starts first
    (conf,) = re.findall("export OREAL_CONF=(.*)", (tmp_path / "run" / "slurm" / "job.sbatch").read_text())
    # What the job composes is what was checked, whatever becomes of the files, and whatever is submitted later.
    mine = config_dir / "objective" / "mine.yaml"
    mine.write_text(mine.read_text().replace("0.25", "0.5"))
    assert run(*submit).returncode == 0
    monkeypatch.setenv("OREAL_CONF", conf)
    assert validated(composed(["objective=mine"])).objective.eta == 0.25


def test_version_of_train_is_the_products(capsys, monkeypatch):
    assert ended(train.main, monkeypatch, "--version") in (0, None)
    assert capsys.readouterr().out.startswith("oreal_megatron ")


LEFT_OPEN = sorted(
    (path.parent.name, path.stem, key)
    for path in (ROOT / "conf").glob("*/*.yaml")
    if path.parent.name != "experiment"
    for key in missing_keys(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
)


@pytest.mark.parametrize(("group", "option", "key"), LEFT_OPEN)
def test_a_value_that_an_option_leaves_open_is_missing(group, option, key):
    """A ??? changes nothing over a value of another option, such as the number of servers of `rollout=sglang`."""
    *sections, name = [group, *key.split(".")]
    section = OmegaConf.select(composed(["experiment=own_model", f"{group}={option}"]), ".".join(sections))
    assert OmegaConf.is_missing(section, name)


@pytest.mark.parametrize(
    ("option", "key", "meaning"),
    [
        ("resources=h100", "resources.trainer_devices", "Number of trainer processes"),
        ("rollout=sglang_disaggregated", "rollout.sglang.num_servers", "Number of servers"),
    ],
)
def test_a_plan_asks_for_a_number_without_a_value(option, key, meaning):
    with pytest.raises(ConfigError) as caught:
        planned_config(["experiment=arithmetic", option], Console(), config_dir=None)
    (violation,) = [found for found in caught.value.violations if found.key == key]
    assert violation.value == "???" and violation.remedy.startswith("It has no value. Set it: ")
    assert meaning in violation.remedy and "/site/" not in str(caught.value)


def test_a_dry_run_asks_for_a_number_that_it_reduces():
    small = planned_config(["experiment=arithmetic", "resources=h100", "run.dry_run=true"], Console(), config_dir=None)
    assert small.resources.trainer_devices == 1  # which it sets itself
    with pytest.raises(ConfigError, match=r"sglang.tensor = '\?\?\?': It has no value. Set it: Tensor-"):
        planned_config(["rollout=sglang_disaggregated", "run.dry_run=true"], Console(), config_dir=None)


def test_a_value_of_the_site_names_the_site():
    found = {violation.key: violation.remedy for violation in refused("experiment=oreal_7b")}
    assert found.keys() == {"cluster.data", "cluster.models"}
    assert "conf/cluster" in found["cluster.data"]


def test_settings_of_a_function_are_overridden_one_by_one():
    config = validated(composed(["objective=gspo", "objective.functions.policy_loss.settings.high=5e-4"]))
    assert config.objective.functions.policy_loss.settings == {"low": 3e-4, "high": 5e-4}
    found = refused("objective=gspo", "objective.functions.policy_los.settings.high=5e-4")
    assert "Did you mean `policy_loss`?" in found[0].remedy
