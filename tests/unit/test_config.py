"""The schema: every violation at once, each with key, value and remedy; every preset and experiment composes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron.config import ConfigError, parse_config

WIDE = "model.geometry.hidden_size=128 model.geometry.ffn_hidden_size=256 +model.geometry.head_dim=64"
FP8_SERVERS = f"rollout=sglang rollout.sglang.dtype=fp8 {WIDE}"
ARGUMENT = "rollout.sglang.arguments."
CONF = Path(__file__).resolve().parents[2] / "conf"


def violations_of(raw) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return {violation.key: str(violation) for violation in caught.value.violations}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "objective").glob("*.yaml")))
def test_every_objective_composes(composed, preset):
    assert parse_config(composed(f"objective={preset}")).objective.preset == preset


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes(composed, experiment):
    # What an experiment leaves to the site must be given; anything does for composing.
    site = {"math_smollm2": ["model.path=/site/model", "data.train=/site/prompts.jsonl"]}
    everywhere = ["cluster.models=/site", "cluster.data=/site"]
    assert parse_config(composed(f"experiment={experiment}", *everywhere, *site.get(experiment, []))).run.num_steps > 0


def test_all_violations_come_at_once(composed):
    raw = composed()
    raw["objective"]["kl_typ"] = "k3"
    raw["objective"]["eta"] = "much"
    raw["rollout"]["samples_per_prompt"] = 0
    raw["model"]["geometry"]["num_query_groups"] = 3
    raw["optimiser"] = {}
    found = violations_of(raw)
    assert "did you mean `kl_type`?" in found["objective.kl_typ"]
    assert "'much'" in found["objective.eta"] and "number" in found["objective.eta"]
    assert "greater than 0" in found["rollout.samples_per_prompt"]
    assert "must divide model.geometry.num_attention_heads = 4" in found["model.geometry.num_query_groups"]
    assert "did you mean `optimizer`?" in found["optimiser"]


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("rollout.samples_per_prompt=1", "rollout.samples_per_prompt", "at least 2"),
        ("rollout.sampling.temperature=0.0", "rollout.sampling.temperature", "all alike"),
        ("rollout.sampling.max_new_tokens=100", "rollout.sampling.max_new_tokens", "at most 64 fit"),
        ("objective.clip=0.2", "objective.clip", "ratio_reference"),
        ("objective.reward_values=[1.0,-1.0]", "objective.reward_values", "must rise"),
        ("prompt.user=solve", "prompt.user", "{question}"),
        ("fp8=tensorwise", "model.implementation", "Transformer Engine's"),
        ("fp8=tensorwise", "model.dtype", "bfloat16"),
        ("fp8=tensorwise resources=a100 resources.trainer_devices=1", "fp8.policy.recipe", "sm80"),
        ("fp8=mxfp8 resources=h100 resources.trainer_devices=1", "fp8.reference.recipe", "tensorwise, blockwise"),
        ("fp8=delayed fp8.reference=${fp8.policy}", "fp8.reference.recipe", "never trained"),
        ("fp8=delayed fp8.policy.amax_history=null", "fp8.policy.amax_history", "needs it"),
        ("fp8=blockwise fp8.policy.amax_history=16", "fp8.policy.amax_history", "belongs to recipe `delayed`"),
        ("fp8=delayed fp8.policy.bf16_first_layers=1", "fp8.policy.bf16_first_layers", "all layers or none"),
        (
            "fp8=mxfp8 fp8.policy.parameters=true parallel.distributed_optimizer=true",
            "fp8.policy.parameters",
            "gradient buffer",
        ),
        ("fp8=blockwise fp8.policy.parameters=true", "fp8.policy.parameters", "distributed_optimizer"),
        ("fp8=blockwise fp8.policy.parameters=true parallel.offload=true", "fp8.reference.parameters", "parked"),
        ("data.arithmetic=null", "data.train", "data=arithmetic"),
        ("sft=none", "model.path", "nothing to sample"),
        ("optimizer.policy.min_lr=1.0", "optimizer.policy.min_lr", "must not exceed lr"),
        ("run.mode=replay", "run.replay_dir", "run.mode=replay"),
        ("parallel.tensor=3", "parallel.tensor", "do not split evenly over 3 ranks"),
        ("parallel.sequence=true", "parallel.sequence", "needs parallel.tensor > 1"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline", "needs parallel.pipeline > 1"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=4", "parallel.virtual_pipeline", "2 stages x 4 runs = 8"),
        (
            "model.geometry.num_query_groups=3 model.geometry.num_attention_heads=6 model.geometry.hidden_size=96 "
            "parallel.tensor=2",
            "parallel.tensor",
            "must divide model.geometry.num_query_groups = 3",
        ),
        (
            "rollout=sglang_cpu rollout.sglang.tensor=4",
            "rollout.sglang.tensor",
            "must divide model.geometry.num_query_groups = 2",
        ),
        (f"{FP8_SERVERS} rollout.sglang.device=cpu", "rollout.sglang.dtype", "kernels for it are for CUDA: null"),
        (f"{FP8_SERVERS} resources=a100 resources.trainer_devices=1", "rollout.sglang.dtype", "from sm89 to sm90"),
        (f"{FP8_SERVERS} rollout.sglang.transport=broadcast", "rollout.sglang.transport", "direct, or ipc"),
        (f"{FP8_SERVERS} rollout.sglang.transport=disk", "rollout.sglang.transport", "direct, or ipc"),
        (
            f"{FP8_SERVERS} rollout.sglang.tensor=4",
            "rollout.sglang.dtype",
            "key-value heads x head_dim is 64 on each of 4 server ranks, FP8 is served in blocks of 128 x 128: null, "
            "or another rollout.sglang.tensor",
        ),
        (
            "rollout=sglang +rollout.sglang.arguments.quantization=fp8",
            ARGUMENT + "quantization",
            "sglang.dtype: SGLang",
        ),
        ("rollout=sglang +rollout.sglang.arguments.dtype=half", ARGUMENT + "dtype", "is rollout.sglang.dtype"),
        ("objective.selection=pair objective.keep_groups=all", "objective.selection", "keep_groups=mixed"),
        ("rollout.long_tail={oversample:1.5,until:useful,carry_updates:1}", "rollout.backend", "nothing of it can be"),
        ("objective=grpo objective.importance_limit=2.0", "objective.importance_limit", "ratio_reference to be `self`"),
        (
            "rollout=sglang rollout.sglang.placement=colocated resources.trainer_devices=1",
            "rollout.sglang.transport",
            "two processes on one device cannot be in one NCCL group: ipc",
        ),
        (
            "objective.importance_limit=2.0 rollout.sampling.temperature=0.7",
            "rollout.sampling.temperature",
            "the policy's at 1.0 only",
        ),
    ],
)
def test_cross_checks_name_the_remedy(composed, override, key, remedy):
    assert remedy in violations_of(composed(*override.split()))[key]


def test_unknown_kl_type_is_an_error(composed):
    assert "k3" in violations_of(composed("objective.kl_type=k2"))["objective.kl_type"]


def test_a_configuration_is_immutable(composed):
    config = parse_config(composed())
    with pytest.raises(Exception, match="frozen"):
        config.run.seed = 1


def test_the_configuration_reference_is_current():
    tool = CONF.parent / "tools" / "configuration_reference.py"
    printed = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=True).stdout
    assert printed == (CONF.parent / "docs" / "configuration.md").read_text(), f"run python {tool.name} again"


def test_configuration_imports_no_torch():
    code = "import sys, oreal_megatron.config, oreal_megatron.types; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
