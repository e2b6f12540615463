"""Whole runs of the command line: what they write, that they repeat, resume, replay, and what bad input does."""

from __future__ import annotations

import gzip
import json

import pytest
import yaml

from oreal_megatron.metrics import read_metrics
from tests.tiny import command_line, invoke, metrics_of

pytestmark = pytest.mark.end_to_end


def test_a_run_leaves_what_a_person_looks_for(finished):
    for name in ("config.yaml", "metrics.jsonl", "report.html", "warm_start.jsonl", "checkpoints/best.json"):
        assert (finished / name).is_file(), name
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["geometry"]["hidden_size"] == 32 and "???" not in str(config)
    report = (finished / "report.html").read_text()
    assert "<svg" in report and "Evaluation: problems solved" in report and "http://www.w3.org" in report
    assert "greedy pass@1 on heldout (16 problems),\nbefore and after 4 steps" in report
    assert "<script src" not in report and "<link" not in report  # opens without a server or a network
    lines = (finished / "trajectories" / "step_000003.jsonl").read_text().splitlines()
    assert len(lines) == 8 * 4
    assert {"id", "prompt", "response_ids", "logprobs", "grade", "weight_spans"} <= json.loads(lines[0]).keys()


def test_the_best_checkpoint_is_a_hugging_face_directory(finished):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    from oreal_megatron.conversion.convert import compare

    best = json.loads((finished / "checkpoints" / "best.json").read_text())["checkpoint"]
    exported = finished / "huggingface" / "best"
    assert exported.resolve().name == best
    models = {"policy": AutoModelForCausalLM}
    models |= {"reward_model": AutoModelForTokenClassification} if best != "initial" else {}
    for name, kind in models.items():
        kind.from_pretrained(exported / name)
        assert AutoTokenizer.from_pretrained(exported / name).chat_template
        assert compare(exported / name, finished / "checkpoints" / best, prefix=f"{name}.") == {}


def test_every_step_and_evaluation_is_in_the_metrics_with_its_phases(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [0, 1, 2, 3]
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 2, 4]
    updated = [r for r in records if r["kind"] == "step" and r["skipped"] is None]
    assert updated, "no step of the tiny run updated anything"
    for record in updated:
        phases = {"generate", "verify", "reward_model"}
        phases |= set() if record["metrics"]["policy/frozen"] else {"score", "policy", "publish"}
        assert set(record["seconds"]) == phases | {"total"}
        assert set(record["peak_gib"]) == phases and all(0.1 < peak < 8 for peak in record["peak_gib"].values())
    assert updated[0]["metrics"]["policy/frozen"] == 1.0 and "loss/policy" not in updated[0]["metrics"]
    trained = [r["metrics"] for r in updated if not r["metrics"]["policy/frozen"]]
    # On-policy and in one process: the trainer's log-probabilities are the rollouts', up to rounding.
    assert trained and all(m["policy/rollout_logprob_difference"] < 1e-4 for m in trained)


def test_one_seed_repeats_and_another_does_not(finished, tmp_path):
    assert invoke(f"run.dir={tmp_path / 'again'}").returncode == 0
    assert metrics_of(tmp_path / "again") == metrics_of(finished)
    assert invoke(f"run.dir={tmp_path / 'other'}", "run.seed=1", "run.num_steps=0").returncode == 0
    first = [metrics_of(directory)[0] for directory in (tmp_path / "other", finished)]
    assert first[0]["kind"] == "evaluation" and first[0] != first[1]


def test_the_same_command_resumes_to_the_same_metrics(finished, warm):
    directory = warm()
    schedules = ["optimizer.policy.decay_steps=4", "optimizer.reward_model.decay_steps=4"]
    assert invoke(f"run.dir={directory}", "run.num_steps=2", *schedules).returncode == 0
    stopped = metrics_of(directory)
    outcome = invoke(f"run.dir={directory}", *schedules)
    assert "resumed from checkpoint step_000002" in outcome.stdout
    assert metrics_of(directory)[: len(stopped)] == stopped
    whole = warm("whole")
    assert invoke(f"run.dir={whole}", *schedules).returncode == 0
    assert metrics_of(directory) == metrics_of(whole)


def test_a_directory_takes_no_other_run(finished):
    before = (finished / "config.yaml").read_text()
    outcome = invoke(f"run.dir={finished}", "objective=grpo", "objective.actor_freeze_steps=0", "run.seed=1")
    assert outcome.returncode == 1
    assert "run.seed = 1" in outcome.stderr and "objective.preset = 'grpo'" in outcome.stderr
    assert (finished / "config.yaml").read_text() == before


def test_rollouts_alone_then_training_from_them(finished, warm, tmp_path):
    rollouts = warm("rollouts")
    outcome = invoke(f"run.dir={rollouts}", "run.mode=rollout", "run.num_steps=2")
    assert outcome.returncode == 0, outcome.stderr
    assert len(list((rollouts / "trajectories").glob("*.jsonl"))) == 2
    assert not list((rollouts / "checkpoints").glob("step_*"))
    replay = warm("replay")
    arguments = [f"run.dir={replay}", "run.mode=replay", f"run.replay_dir={rollouts / 'trajectories'}"]
    outcome = invoke(*arguments, "run.num_steps=2")
    assert outcome.returncode == 0, outcome.stderr
    # The first step's policy is the same, so what is trained from its rollouts is the same too.
    first = [next(r for r in metrics_of(d) if r["kind"] == "step") for d in (replay, finished)]
    assert first[0] == first[1]
    beyond = invoke(*arguments, "run.num_steps=5")
    assert beyond.returncode == 1 and "there is no" in beyond.stderr and "run.num_steps" in beyond.stderr


def test_steps_without_a_usable_group_update_nothing(warm, tmp_path):
    impossible = tmp_path / "impossible.jsonl"
    impossible.write_text("".join(f'{{"question": "Compute {i}+1.", "gold_answer": "7777"}}\n' for i in range(8)))
    directory = warm()
    outcome = invoke(f"run.dir={directory}", f"data.train={impossible}", "run.num_steps=2")
    assert outcome.returncode == 0, outcome.stderr
    assert "updated nothing: no usable group among 8: 0 all correct, 8 all incorrect" in outcome.stdout
    steps = [r for r in metrics_of(directory) if r["kind"] == "step"]
    assert len(steps) == 2 and all(r["skipped"] for r in steps)


def test_the_release_spends_the_policys_warm_up_while_it_is_frozen(finished, warm):
    directory = warm("release")
    assert invoke(f"run.dir={directory}", "objective=oreal_release", "run.num_steps=2").returncode == 0

    def rate_of_first_update(run):
        return next(r["metrics"]["policy/lr"] for r in metrics_of(run) if "policy/lr" in r["metrics"])

    # One frozen step, three steps of warm-up to 3e-4: ours starts at the first of them, the release's at the second.
    assert rate_of_first_update(finished) == pytest.approx(1e-4)
    assert rate_of_first_update(directory) == pytest.approx(2e-4)


def test_a_response_without_an_answer_is_incorrect(warm):
    directory = warm()
    # Three tokens are no solution: every response ends for want of room.
    assert invoke(f"run.dir={directory}", "rollout.sampling.max_new_tokens=3", "run.num_steps=1").returncode == 0
    lines = (directory / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    grades = {(r["finish_reason"], r["grade"]["verdict"], r["grade"]["stage"]) for r in map(json.loads, lines)}
    assert grades == {("length", "INCORRECT", "stop")}


def test_nan_in_a_loss_stops_with_step_terms_and_samples(warm):
    directory = warm()
    outcome = invoke(
        f"run.dir={directory}", "objective.reward_values=[-1e200,1e200]", "run.checkpoint_every=1",
    )  # fmt: skip
    assert outcome.returncode == 1
    assert "error: step " in outcome.stderr and "Traceback" not in outcome.stderr
    assert "terms that are not finite numbers" in outcome.stderr and "positive = " in outcome.stderr
    assert "micro-batch of train-0" in outcome.stderr
    assert list((directory / "checkpoints").glob("step_*")), "the last good checkpoint is kept"


def test_a_step_whose_later_update_is_refused_is_not_saved(warm):
    """The first update makes numbers so large that the second has no finite loss."""
    directory = warm()
    outcome = invoke(
        f"run.dir={directory}", "objective.updates.epochs=2", "run.checkpoint_every=1", "evaluation.every=0",
        "optimizer.policy={lr: 1.0e+30, min_lr: 1.0e+30}", "objective.actor_freeze_steps=1",
    )  # fmt: skip
    assert outcome.returncode == 1
    assert "error: step 1: update 2 of 2: " in outcome.stderr and "neither saved nor published" in outcome.stderr
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_000001"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.implementation=transformer_engine"], "model.implementation = 'transformer_engine'"),
        (["objective.eta=much"], "objective.eta = 'much'"),
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt = 1"),
        (["prompt.max_prompt_tokens=4"], "every prompt is longer than prompt.max_prompt_tokens = 4"),
        (["data.prompts_per_step=1000"], "only 48 different prompts are left"),
        (["data.arithmetic=null", "data.train=nowhere.jsonl"], "sft.demonstrations"),
        (["prompt.stop_token='<|stop|>'"], "prompt.stop_token = '<|stop|>' is not one token"),
        (
            ["parallel.tensor=2"],
            "x context 1 = 2': 1 process(es) do not split into replicas of 2",
        ),
    ],
)
def test_bad_input_is_one_clear_error(warm, overrides, message):
    outcome = invoke(f"run.dir={warm()}", *overrides)
    assert outcome.returncode == 1
    assert message in outcome.stderr and "Traceback" not in outcome.stderr


def test_what_a_site_must_give_is_asked_for_all_at_once():
    outcome = command_line("experiment=math_smollm2")
    assert outcome.returncode == 1
    assert "data.train = '???'" in outcome.stderr and "model.path = '???'" in outcome.stderr
    nowhere = command_line("experiment=math_smollm2", "model.path=/nowhere", "data.train=x.jsonl")
    assert (
        nowhere.returncode == 1
        and "model.path = '/nowhere'" in nowhere.stderr
        and "data.train = 'x.jsonl'" in nowhere.stderr
    )


def test_model_and_problems_of_ones_own_are_evaluated_without_training_prompts(finished, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"question": "Compute {i}+1.", "gold_answer": "{i + 1}"}}\n' for i in range(3)))
    own = [f"model.path={finished}/huggingface/best/policy", f"+evaluation.benchmarks.sums={problems}"]
    quiet = ["tracking.wandb=disabled", "tracking.tensorboard=false", "run.export=none", "prompt=chat"]
    outcome = command_line(
        "experiment=own_model", "data.train=null", "run.num_steps=0", f"run.dir={tmp_path}/run", *own, *quiet,
        "rollout.sampling.max_new_tokens=24", "prompt.max_prompt_tokens=64", "model.max_sequence_length=128",
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert "sums: problems 3  undecided 0  undecided_share 0.0%  greedy_pass@1" in outcome.stdout
    assert "0/0" not in outcome.stdout
    assert "(3 problems),\nthe initial policy, before any step" in (tmp_path / "run" / "report.html").read_text()


def test_an_unknown_override_names_the_key(tmp_path):
    outcome = invoke(f"run.dir={tmp_path}", "objective.kl_typ=k3")
    assert outcome.returncode == 1 and "`kl_type`" in outcome.stderr
    added = invoke(f"run.dir={tmp_path}", "+objective.kl_typ=k3")
    assert added.returncode == 1 and "`kl_type`" in added.stderr


def test_malformed_prompt_files_are_named_by_file_and_line(warm, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "Compute 1+1.", "gold_answer": "2"}\n{"question": \n')
    outcome = invoke(f"run.dir={warm()}", f"data.train={bad}")
    assert outcome.returncode == 1 and f"{bad}:2: not JSON" in outcome.stderr


def test_a_sweep_is_one_run_a_value(warm, tmp_path):
    for temperature in ("0.8", "1.0"):
        warm(f"at_{temperature}")
    overrides = ["rollout.sampling.temperature=0.8,1.0", f"run.dir={tmp_path}/at_${{rollout.sampling.temperature}}"]
    overrides += ["run.num_steps=1"]
    overrides += [f"hydra.sweep.dir={tmp_path}/sweep"]
    outcome = invoke(*overrides, flags=("--multirun",))
    assert outcome.returncode == 0, outcome.stderr
    assert metrics_of(tmp_path / "at_0.8") != metrics_of(tmp_path / "at_1.0")


def test_overlong_prompts_are_left_out_and_counted(warm, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    long = '{"id": "long", "question": "' + "1+" * 60 + '1", "gold_answer": "61"}\n'
    prompts.write_text(
        long + "".join(f'{{"question": "Compute {i}+1.", "gold_answer": "{i + 1}"}}\n' for i in range(8))
    )
    outcome = invoke(f"run.dir={warm()}", f"data.train={prompts}", "run.num_steps=1")
    assert outcome.returncode == 0, outcome.stderr
    assert "1 of 9 prompts left out, longer than prompt.max_prompt_tokens = 64 (first: long)" in outcome.stdout


def test_help_and_cfg_job_work():
    shown = invoke("--cfg", "job")
    assert shown.returncode == 0 and "actor_freeze_steps: 1" in shown.stdout
    helped = invoke("--help")
    assert helped.returncode == 0 and "experiment=arithmetic" in helped.stdout


def test_a_profiled_step_has_a_trace_with_its_phases(finished):
    (trace,) = (finished / "traces").iterdir()
    assert trace.name == "step_000001.rank_0000.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"generate", "verify", "reward_model", "publish", "aten::mm"} <= names


def test_a_timeline_has_the_phases_of_its_steps(finished):
    (path,) = (finished / "timeline").iterdir()
    assert path.name == "steps_000001_000002.json"
    phases = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    steps = {event["name"]: event for event in phases if event["name"].startswith("step ")}
    assert list(steps) == ["step 1", "step 2"]
    seconds = {record["step"]: record["seconds"] for record in read_metrics(finished)[0]}
    for step in (1, 2):
        whole = steps[f"step {step}"]
        within = [e for e in phases if whole["ts"] <= e["ts"] < whole["ts"] + whole["dur"] and e is not whole]
        assert all(e["ts"] + e["dur"] <= whole["ts"] + whole["dur"] for e in within)
        found = {name: sum(e["args"]["seconds"] for e in within if e["name"] == name) for name in seconds[step]}
        assert found | {"total": 0} == pytest.approx(seconds[step] | {"total": 0}, abs=1e-6)
        assert seconds[step]["total"] == pytest.approx(whole["args"]["seconds"], rel=0.2)
    # An evaluation and a checkpoint are due after the first of the two steps.
    after = [event["name"] for event in phases if event["ts"] >= steps["step 1"]["ts"] + steps["step 1"]["dur"]]
    assert after.index("evaluation") < after.index("save") < after.index("step 2")
