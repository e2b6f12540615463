"""The command line of `oreal-eval`: its configuration trains nothing, and mistakes are one clear message."""

from __future__ import annotations

import argparse
import json

import pytest

from oreal_megatron.cli.eval import evaluation_config, main


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "models" / "tiny=odd {name}"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def parsed(model, *overrides, benchmarks=(("sums", "sums.jsonl"),), samples=None, limit=None):
    return argparse.Namespace(
        model=str(model), overrides=list(overrides), benchmark=list(benchmarks), samples=samples, limit=limit,
        config_dir=None,
    )  # fmt: skip


def test_an_evaluation_has_nothing_that_trains(model):
    config = evaluation_config(parsed(model, samples=4, limit=10))
    assert config.model.path == config.model.tokenizer == str(model)
    assert config.run.dir == "evaluations/tiny=odd {name}" and config.run.num_steps == 0
    assert config.data.train is None and config.sft is None and not config.fp8.models
    (sums,) = config.evaluation.benchmarks.values()
    assert (sums.path, sums.samples, sums.limit) == ("sums.jsonl", 4, 10)


def test_samples_and_limit_are_also_those_of_a_benchmark_given_as_a_path(model):
    overrides = ["evaluation=none", "+evaluation.benchmarks.m=m.jsonl"]
    config = evaluation_config(parsed(model, *overrides, benchmarks=(), samples=4, limit=10))
    (found,) = config.evaluation.benchmarks.values()
    assert (found.path, found.samples, found.limit) == ("m.jsonl", 4, 10)


@pytest.mark.parametrize(
    ("directory", "name"),
    [("m", "m"), ("runs/arithmetic/huggingface/best/policy", "arithmetic_best"), ("other/best/policy", "policy")],
)
def test_an_evaluation_of_an_export_is_named_after_run_and_step(tmp_path, directory, name):
    model = tmp_path / directory
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert evaluation_config(parsed(model)).run.dir == f"evaluations/{name}"


@pytest.mark.parametrize("experiment", ["oreal_32b", "oreal_7b_disaggregated", "arithmetic", "math_smollm2"])
def test_settings_of_a_recipe_are_taken_without_its_training(model, experiment):
    site = ["cluster.data=data", "cluster.models=models", "run.dir=evaluations/x"]
    config = evaluation_config(parsed(model, f"experiment={experiment}", "model.geometry=null", *site))
    assert (config.run.num_steps, config.sft, config.run.dir) == (0, None, "evaluations/x")
    assert list(config.evaluation.benchmarks) == ["sums"]


def test_the_usual_benchmarks_are_an_option(model):
    config = evaluation_config(parsed(model, "evaluation=benchmarks", "cluster.data=/data", benchmarks=()))
    names = ["math500", "olympiadbench", "amc23", "aime24", "aime25_1", "aime25_2"]
    assert list(config.evaluation.benchmarks) == names
    assert {name: item.path for name, item in config.evaluation.benchmarks.items()} == {
        name: f"/data/{name}.jsonl" for name in names
    }


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"benchmarks": ()}, "there is no benchmark. Name one with --benchmark NAME=FILE.jsonl"),
        (["run.num_steps=5"], {}, "run.num_steps=5: oreal-eval takes MODEL and trains nothing"),
        (["data.train=x.jsonl"], {}, "data.train=x.jsonl: oreal-eval"),
        (["sft=arithmetic"], {}, "sft=arithmetic: oreal-eval"),
        (["evaluation=heldout"], {"benchmarks": [("heldout", "a")]}, "there is a benchmark heldout already"),
        ([], {"benchmarks": [("a/b", "a")]}, "evaluation.benchmarks.a/b"),
        ([], {"samples": -1}, "evaluation.benchmarks.sums.samples = -1"),
        (["evaluation.sampling.max_new_tokens=9000"], {}, "evaluation.sampling.max_new_tokens = 9000"),
    ],
)
def test_a_mistake_is_one_message(model, overrides, options, message):
    with pytest.raises(ValueError) as caught:
        evaluation_config(parsed(model, *overrides, **options))
    assert message in str(caught.value)


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code != 0
    return capsys.readouterr().err


def test_a_run_is_answered_with_the_directory_of_its_model(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    assert "oreal-convert to-hf RUN/checkpoints/step_NNNNNN" in refused(capsys, run, "--benchmark", "a=b")
    (run / "huggingface" / "best" / "policy").mkdir(parents=True)
    assert f"Name its model, {run}/huggingface/best/policy" in refused(capsys, run, "--benchmark", "a=b")


def test_a_benchmark_is_a_name_and_a_file(model, capsys):
    assert "'math500.jsonl' is not NAME=FILE" in refused(capsys, model, "--benchmark", "math500.jsonl")


def test_comparison_of_what_is_no_evaluation(tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text(json.dumps({"benchmarks": {}}))
    message = refused(capsys, "compare", tmp_path, tmp_path / "nowhere")
    assert "nowhere" in message and "there is no such file" in message and "Traceback" not in message
