"""The schema: every violation at once, each with key, value and remedy; every preset and experiment composes."""

from __future__ import annotations

import functools
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron.compose import composed as compose
from oreal_megatron.config import ConfigError, TrainConfig, Violation, check_resume, parse_config
from oreal_megatron.config.parsing import ADDED
from tools.configuration_reference import nested

WIDE = "model.geometry.hidden_size=128 model.geometry.ffn_hidden_size=256 +model.geometry.head_dim=64"
AHEAD, SCHEDULE = "rollout=sglang_cpu rollout.schedule=continuous", "rollout.schedule"
FP8_SERVERS = f"rollout=sglang rollout.sglang.dtype=fp8 {WIDE}"
ARGUMENT = "rollout.sglang.arguments."
SPECULATIVE = f"++{ARGUMENT}speculative-"
SPECULATING = (
    "rollout=sglang_disaggregated rollout.sglang.num_servers=1 rollout.sglang.tensor=1 "
    f"{SPECULATIVE}algorithm=EAGLE {SPECULATIVE}use-rejection-sampling=true "
    f"{SPECULATIVE}draft-load-format=auto {SPECULATIVE}draft-model-path=/site/draft"
)
CONF = Path(__file__).resolve().parents[2] / "conf"


def violations_of(raw) -> dict[str, Violation]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return {violation.key: violation for violation in caught.value.violations}


def value_at(raw, key: str):
    for name in key.split("."):
        raw = raw[name]
    return tuple(raw) if isinstance(raw, list) else raw


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "objective").glob("*.yaml")))
def test_objective_composes(composed, preset):
    assert parse_config(composed(f"objective={preset}")).objective.preset == preset


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiment_composes(composed, experiment):
    # What an experiment leaves to the site must be given; anything does for composing.
    given = ["model.path=/site/model", "data.train=/site/prompts.jsonl"]
    site = {
        "math_smollm2": given,
        "sft": ["model.path=/site/model", "sft.demonstrations=/site/records.jsonl"],
        "own_model": [*given, "+evaluation.benchmarks.math500=/site/problems.jsonl"],
    }
    everywhere = ["cluster.models=/site", "cluster.data=/site"]
    config = parse_config(composed(f"experiment={experiment}", *everywhere, *site.get(experiment, [])))
    assert (config.run.num_steps > 0) != config.is_sft


def test_speculative_decoding_with_rejection_sampling_is_taken(composed):
    short = ("rollout.sampling.max_new_tokens=32", "evaluation.sampling.max_new_tokens=32")
    servers = parse_config(composed(*SPECULATING.split(), *short)).rollout.sglang
    assert servers is not None and servers.options["speculative-algorithm"] == "EAGLE"


def test_violations_come_all_at_once(composed):
    raw = composed()
    raw["objective"]["kl_typ"] = "k3"
    raw["objective"]["eta"] = "much"
    raw["rollout"]["samples_per_prompt"] = 0
    raw["model"]["geometry"]["num_query_groups"] = 3
    raw["optimiser"] = {}
    found = violations_of(raw)
    assert {key: violation.value for key, violation in found.items()} == {
        "objective.kl_typ": "k3",
        "objective.eta": "much",
        "rollout.samples_per_prompt": 0,
        "model.geometry.num_query_groups": 3,
        "optimiser": {},
    }
    assert "`kl_type`" in found["objective.kl_typ"].remedy and "`optimizer`" in found["optimiser"].remedy


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.samples_per_prompt=1", "rollout.samples_per_prompt"),
        ("rollout.sampling.temperature=0.0", "rollout.sampling.temperature"),
        ("rollout.sampling.max_new_tokens=100", "rollout.sampling.max_new_tokens"),
        ("objective.clip=0.2", "objective.clip"),
        ("objective=grpo_epochs objective.updates={epochs:1,minibatches:1}", "objective.clip"),
        ("objective=oreal_release objective.updates.epochs=2", "objective.updates"),
        ("objective.reward_values=[1.0,-1.0]", "objective.reward_values"),
        ("prompt.user=solve", "prompt.user"),
        ("fp8=tensorwise", "model.implementation"),
        ("fp8=tensorwise", "model.dtype"),
        ("fp8=tensorwise resources=a100 resources.trainer_devices=1", "fp8.policy.recipe"),
        ("fp8=mxfp8 resources=h100 resources.trainer_devices=1", "fp8.reference.recipe"),
        ("fp8=delayed fp8.reference=${fp8.policy}", "fp8.reference.recipe"),
        ("fp8=delayed fp8.policy.amax_history=null", "fp8.policy.amax_history"),
        ("fp8=blockwise fp8.policy.amax_history=16", "fp8.policy.amax_history"),
        ("fp8=delayed fp8.policy.bf16_first_layers=1", "fp8.policy.bf16_first_layers"),
        ("fp8=mxfp8 fp8.policy.parameters=true parallel.distributed_optimizer=true", "fp8.policy.parameters"),
        ("fp8=blockwise fp8.policy.parameters=true", "fp8.policy.parameters"),
        ("fp8=blockwise fp8.policy.parameters=true parallel.offload=true", "fp8.reference.parameters"),
        ("data.train={}", "data.train"),
        ("data.train={a:{path:x,weight:1.0},b:{path:y,weight:null}}", "data.train.b.weight"),
        ("data.train={a:{path:x,weight:0.0}}", "data.train.a.weight"),
        ("data.curriculum={rollout_weight:0.5} data.difficulty_balance=[]", "data.curriculum"),
        ("data.arithmetic=null", "data.train"),
        ("sft=none", "model.path"),
        ("optimizer.policy.min_lr=1.0", "optimizer.policy.min_lr"),
        ("run.mode=replay", "run.replay_dir"),
        ("run.seed=99999999999999999999", "run.seed"),
        ("parallel.tensor=3", "parallel.tensor"),
        ("parallel.sequence=true", "parallel.sequence"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=4", "parallel.virtual_pipeline"),
        (
            "model.geometry.num_query_groups=3 model.geometry.num_attention_heads=6 model.geometry.hidden_size=96 "
            "parallel.tensor=2",
            "parallel.tensor",
        ),
        ("rollout=sglang_cpu rollout.sglang.tensor=4", "rollout.sglang.tensor"),
        (f"{FP8_SERVERS} rollout.sglang.device=cpu", "rollout.sglang.dtype"),
        (f"{FP8_SERVERS} resources=a100 resources.trainer_devices=1", "rollout.sglang.dtype"),
        (f"{FP8_SERVERS} rollout.sglang.transport=broadcast", "rollout.sglang.transport"),
        (f"{FP8_SERVERS} rollout.sglang.transport=disk", "rollout.sglang.transport"),
        (f"{FP8_SERVERS} rollout.sglang.tensor=4", "rollout.sglang.dtype"),
        (f"{FP8_SERVERS} rollout.sglang.full_every=2", "rollout.sglang.full_every"),
        ("rollout=sglang rollout.sglang.transport=ipc rollout.sglang.full_every=2", "rollout.sglang.full_every"),
        (
            "rollout=sglang_cpu rollout.sglang.placement=colocated rollout.sglang.full_every=2 "
            "resources.trainer_devices=1",
            "rollout.sglang.full_every",
        ),
        ("rollout=sglang +rollout.sglang.arguments.quantization=fp8", ARGUMENT + "quantization"),
        ("rollout=sglang +rollout.sglang.arguments.dtype=half", ARGUMENT + "dtype"),
        (f"{SPECULATING} {SPECULATIVE}algorithm=NGRAM", ARGUMENT + "speculative-algorithm"),
        (f"{SPECULATING} rollout.sglang.device=cpu", ARGUMENT + "speculative-algorithm"),
        (f"{SPECULATING} rollout.sglang.placement=colocated", ARGUMENT + "speculative-algorithm"),
        (f"{SPECULATING} rollout.sglang.transport=disk", "rollout.sglang.transport"),
        (
            f"{SPECULATING} {SPECULATIVE}use-rejection-sampling=false",
            ARGUMENT + "speculative-use-rejection-sampling",
        ),
        (f"{SPECULATING} {SPECULATIVE}accept-threshold-acc=0.9", ARGUMENT + "speculative-accept-threshold-acc"),
        (f"{SPECULATING} {SPECULATIVE}accept-threshold-single=0.9", ARGUMENT + "speculative-accept-threshold-single"),
        (f"{SPECULATING} {SPECULATIVE}use-block-verification=true", ARGUMENT + "speculative-use-block-verification"),
        (
            f"{SPECULATING} ++rollout.sglang.arguments.enable-multi-layer-eagle=true",
            ARGUMENT + "enable-multi-layer-eagle",
        ),
        (f"{SPECULATING} {SPECULATIVE}draft-load-format=dummy", ARGUMENT + "speculative-draft-load-format"),
        ("objective.selection=pair objective.keep_groups=all", "objective.selection"),
        ("objective=oreal objective.selection=correct", "objective.selection"),
        ("rollout.long_tail={oversample:1.5,until:useful,carry_updates:1}", "rollout.backend"),
        ("rollout=sglang_cpu rollout.max_staleness=1", "rollout.max_staleness"),
        ("rollout=sglang_cpu rollout.schedule=one_ahead rollout.max_staleness=0", "rollout.max_staleness"),
        ("rollout=sglang_cpu rollout.schedule=one_ahead rollout.max_staleness=2", "rollout.max_staleness"),
        ("rollout=sglang_cpu rollout.schedule=continuous rollout.max_staleness=0", "rollout.max_staleness"),
        ("rollout.schedule=one_ahead", "rollout.schedule"),
        (
            f"{AHEAD} rollout.sglang.placement=colocated rollout.sglang.transport=ipc resources.trainer_devices=1",
            SCHEDULE,
        ),
        (f"{AHEAD} rollout.long_tail={{oversample:1.5,until:useful,carry_updates:1}}", SCHEDULE),
        (f"{AHEAD} rollout.generation={{function:{{path:random.random,settings:{{}}}},seconds:9.0}}", SCHEDULE),
        (f"{AHEAD} run.mode=rollout", SCHEDULE),
        ("objective=grpo objective.importance_limit=2.0", "objective.importance_limit"),
        ("objective.importance_token_band=[1.1,2.0]", "objective.importance_token_band"),
        ("objective.importance_response_band=[2.0,0.5]", "objective.importance_response_band"),
        ("rollout=sglang_cpu rollout.sglang.port=9200 tracking.prometheus_port=9200", "tracking.prometheus_port"),
        ("tracking.profile=[4,3]", "tracking.profile"),
        ("tracking.timeline=[4,3]", "tracking.timeline"),
        ("tracking.memory_snapshot=true", "tracking.memory_snapshot"),
        ("tracking.memory_snapshot=true tracking.profile=[3,4]", "tracking.memory_snapshot"),
        ("rollout=sglang rollout.sglang.placement=colocated resources.trainer_devices=1", "rollout.sglang.transport"),
        ("objective.importance_limit=2.0 rollout.sampling.temperature=0.7", "rollout.sampling.temperature"),
        ("run.mode=sft", "run.num_steps"),
        ("run.mode=sft run.num_steps=0 sft=none", "sft"),
        ("run.mode=sft run.num_steps=0 model.reward_model=x", "model.reward_model"),
        ("run.mode=sft run.num_steps=0 model.implementation=transformer_engine", "model.implementation"),
        ("sft.heldout={path:b}", "sft.heldout.path"),
        ("sft.steps=null", "sft.steps"),
        ("sft.epochs=1.0", "sft.steps"),
        ("sft.demonstrations=a.jsonl sft.sources={a:{path:b}}", "sft.demonstrations"),
    ],
)
def test_cross_checks_name_key_and_value(composed, override, key):
    raw = composed(*override.split())
    assert violations_of(raw)[key].value == value_at(raw, key)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("verifier.num_workers='3'", "verifier.num_workers"),
        ("verifier.timeout_seconds=true", "verifier.timeout_seconds"),
        ("verifier.judge.max_attempts='3'", "verifier.judge.max_attempts"),
        ("verifier.judge.mode=sometimes", "verifier.judge.mode"),
        ("rollout.batch_size='3'", "rollout.batch_size"),
        ("tracking.prometheus_port=0", "tracking.prometheus_port"),
    ],
)
def test_sections_coerce_nothing(composed, override, key):
    raw = composed(override)
    assert violations_of(raw)[key].value == value_at(raw, key)


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("objektive=grpo", "objektive", "objective"),
        ("objective=gprpo", "objective", "grpo"),
        ("objective.kl_typ=k1", "objective.kl_typ", "kl_type"),
        ("rollout.sglang.tensr=2", "rollout.sglang.tensr", "tensor"),
        ("evaluation.benchmarks.heldout.sampls=2", "evaluation.benchmarks.heldout.sampls", "samples"),
        ("cluster.partiton=batch", "cluster.partiton", "partition"),
        ("rollout.sglang.port=3000", "rollout.sglang.port", "+rollout.sglang.port=3000"),
    ],
)
def test_composition_suggests_the_nearest_key(override, key, nearest):
    with pytest.raises(ConfigError) as caught:
        compose([override, "run.seed=1"])
    (violation,) = caught.value.violations
    assert violation.key == key and nearest in violation.remedy


def test_geometry_has_one_head_dimension(composed):
    geometry = parse_config(composed()).model.geometry
    assert geometry.head_dim is None and geometry.attention_head_dim == 16
    assert geometry.model_copy(update={"head_dim": 24}).attention_head_dim == 24


def test_every_key_is_described():
    """Except keys of nested sections, which the section's docstring describes."""

    def undescribed(model, path=""):
        for name, field in model.model_fields.items():
            inner = nested(field.annotation)
            if not inner and not (field.description or "").strip():
                yield path + name
            for section in inner:
                assert (section.__doc__ or "").strip(), section
                yield from undescribed(section, f"{path}{name}.")

    assert list(undescribed(TrainConfig)) == []


def test_unknown_kl_type_is_an_error(composed):
    assert violations_of(composed("objective.kl_type=k2"))["objective.kl_type"].value == "k2"


def test_configuration_is_immutable(composed):
    config = parse_config(composed())
    with pytest.raises(Exception, match="frozen"):
        config.run.seed = 1


def test_configuration_reference_is_current():
    tool = CONF.parent / "tools" / "configuration_reference.py"
    printed = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=True).stdout
    assert printed == (CONF.parent / "docs" / "configuration.md").read_text(), f"run python {tool.name} again"


def test_configuration_imports_no_torch():
    code = "import sys, oreal_megatron.config, oreal_megatron.types; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_of_an_earlier_version_resumes_with_what_that_version_did(composed):
    """Keys that came later are not in its config.yaml; other keys must be as they were."""
    same = parse_config(composed("objective.token_weights.alignment=predictor"))
    saved = same.model_dump(mode="json")
    for key in [*ADDED, "rollout.undecided"]:
        section, _, name = key.rpartition(".")
        del functools.reduce(operator.getitem, section.split("."), saved)[name]
    assert [saved["objective"].pop(name) for name in ("reward_model", "functions", "updates")] == [{}] * 3
    check_resume(saved, same, "config.yaml")
    with pytest.raises(ConfigError) as error:
        check_resume(saved, parse_config(composed("objective.optimizer=release")), "config.yaml")
    assert {found.key for found in error.value.violations} == {
        "objective.optimizer",
        "objective.token_weights.alignment",
    }


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ("", 0),
        ("rollout.schedule=one_ahead", 1),
        ("rollout.schedule=continuous", 2),
        ("rollout.schedule=continuous rollout.max_staleness=4", 4),
    ],
)
def test_schedule_has_a_bound_of_its_own_and_may_change_when_a_run_resumes(composed, given, bound):
    ahead = parse_config(composed("rollout=sglang_cpu", *given.split()))
    assert ahead.rollout.staleness_bound == bound
    for other in ("rollout.schedule=in_turn", "rollout.schedule=continuous rollout.max_staleness=1"):
        saved = parse_config(composed("rollout=sglang_cpu", *other.split())).model_dump(mode="json")
        check_resume(saved, ahead, "config.yaml")


def test_length_of_fine_tuning_may_change_and_that_of_a_warm_start_may_not(composed):
    def changed(*overrides: str) -> set[str]:
        mode = overrides[:2]
        saved = parse_config(composed(*mode)).model_dump(mode="json")
        try:
            check_resume(saved, parse_config(composed(*overrides)), "config.yaml")
        except ConfigError as error:
            return {found.key for found in error.violations}
        return set()

    longer = ("sft.steps=null", "sft.epochs=2.0", "sft.batch_size=80")
    assert changed("run.mode=sft", "run.num_steps=0", *longer) == {"sft.batch_size"}
    assert changed("run.mode=train", "run.num_steps=90", *longer) == {"sft.batch_size", "sft.steps", "sft.epochs"}


def test_fine_tuning_without_evaluation_needs_no_room_for_responses_and_no_masks_of_local_layers(composed):
    short = ("model.max_sequence_length=48", "prompt.max_prompt_tokens=64")
    sft = ("run.mode=sft", "run.num_steps=0", "evaluation=none", "model.implementation=transformer_engine")
    config = parse_config(composed(*sft, *short))
    assert config.is_sft and not config.generates and not config.trains_reward_model
    assert "rollout.sampling.max_new_tokens" in violations_of(composed(*short))
