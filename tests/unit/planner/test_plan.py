"""The planner: counts are those of the modules that a run builds, memory follows the layout, problems name figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from oreal_megatron.cli.planning import num_devices, planner_of
from oreal_megatron.compose import composed, resolved, with_placeholders
from oreal_megatron.config import (
    ConfigError,
    GeometryConfig,
    ModelConfig,
    ParallelConfig,
    RopeScalingConfig,
    TrainConfig,
    parse_config,
)
from oreal_megatron.models.memory_profile import MemoryProfiler
from oreal_megatron.planner.footprints import DecodedBatch, RankFootprint
from oreal_megatron.planner.planner import Plan, first_change, search, splits
from oreal_megatron.planner.sizes import num_parameters
from oreal_megatron.planner.step_time import assumed_workload, read_measured

SMALL = GeometryConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=1003,
)


def profiler(geometry: GeometryConfig = SMALL) -> MemoryProfiler:
    model = ModelConfig(
        path=None,
        geometry=geometry,
        tokenizer="arithmetic",
        implementation="local",
        dtype="float32",
        max_sequence_length=256,
    )
    return MemoryProfiler(geometry, model, draw=lambda logits: logits.argmax(-1))


def stages(**options) -> list[RankFootprint]:
    layout = ParallelConfig(**{"tensor": 1, "pipeline": 1, "micro_batch_tokens": 256, **options})
    return profiler().stages(layout, 256, None)


def decoding_stages(geometry: GeometryConfig) -> list[RankFootprint]:
    layout = ParallelConfig(tensor=2, pipeline=1, micro_batch_tokens=128)
    batch = DecodedBatch(num_sequences=2, prompt_tokens=8, new_tokens=8)
    return profiler(geometry).stages(layout, 128, batch)


def test_a_scaled_model_has_the_footprint_of_the_model_without_scaling(apart):
    yarn = RopeScalingConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    scaled = SMALL.model_copy(update={"rope_scaling": yarn})
    assert apart(decoding_stages, scaled) == apart(decoding_stages, SMALL)


def plan_of(*overrides: str) -> Plan:
    config = configuration(*overrides)
    return planner_of(config)(config)


def plan_and_first_change(*overrides: str) -> tuple[Plan, tuple[str, Plan] | None]:
    config = configuration(*overrides)
    plan = planner_of(config)(config)
    return plan, first_change(plan, planner_of(config))


def configuration(*overrides: str) -> TrainConfig:
    raw = composed(list(overrides))
    with_placeholders(raw)
    return parse_config(resolved(raw))


@pytest.fixture(scope="module")
def plan_32b(apart) -> Plan:
    return apart(plan_of, "experiment=oreal_32b")


def test_counts_agree_with_the_published_size(plan_32b):
    # 32.76B: the number of elements in Qwen2.5-32B's safetensors.
    assert num_parameters(plan_32b.sizes.geometry) == 32_763_876_352
    per_rank = [f.policy_parameters for f in plan_32b.footprints]
    # Norms and the biases of row-parallel layers are on every tensor rank: a little more than an eighth.
    assert sum(per_rank) * 8 == pytest.approx(32_763_876_352, rel=1e-3)
    assert sum(per_rank) * 8 > 32_763_876_352


@pytest.mark.parametrize("options", [{}, {"tensor": 2}, {"pipeline": 2}, {"pipeline": 4}, {"tensor": 4, "pipeline": 2}])
def test_stages_hold_the_whole_model(apart, options):
    found = apart(stages, **options)
    assert len(found) == options.get("pipeline", 1)
    assert sum(stage.num_layers for stage in found) == SMALL.num_layers
    tensor = options.get("tensor", 1)
    norms = SMALL.hidden_size * (2 * SMALL.num_layers + 1)
    padding = (-SMALL.vocab_size % tensor) * SMALL.hidden_size * 2
    assert (sum(s.policy_parameters for s in found) - norms) * tensor + norms == num_parameters(SMALL) + padding
    head = SMALL.hidden_size + 1
    vocabulary = (SMALL.vocab_size + -SMALL.vocab_size % tensor) // tensor * SMALL.hidden_size
    assert found[-1].policy_parameters - found[-1].reward_model_parameters == vocabulary - head


def test_footprint_keeps_what_autograd_saves(apart, single_process):
    """Against a real forward pass: bytes of the distinct tensors that its graph holds."""
    from oreal_megatron.data.packing import PackedSequence, pack
    from oreal_megatron.models.pipeline_schedule import _forward_step
    from oreal_megatron.models.policy import build_policy

    kept = []
    for num_layers in (1, 2):
        geometry = SMALL.model_copy(update={"num_layers": num_layers})
        module = build_policy(geometry, profiler().model, single_process, vocab_size=1003, seed=0)
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        held: dict[int, int] = {}

        def pack_hook(tensor: torch.Tensor, held=held, weights=weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = pack([PackedSequence(id="a", prompt_ids=(1,) * 56, response_ids=(2,) * 200)], torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            output, _ = _forward_step(lambda out, _: (out.sum(), None), single_process, iter([batch]), module)
        kept.append(sum(held.values()))
        del output
    real = kept[1] - kept[0]
    assert apart(stages)[0].layer_kept == pytest.approx(real, rel=0.1)


def test_memory_follows_the_layout(apart):
    plain, selective, full = (apart(stages, recompute=recompute)[0] for recompute in ("none", "selective", "full"))
    # Full recompute keeps a layer's input alone.
    assert full.layer_kept == 256 * SMALL.hidden_size * 4
    assert full.layer_kept < selective.layer_kept < plain.layer_kept
    by_tensor, by_sequence = (apart(stages, tensor=4, sequence=sequence)[0] for sequence in (False, True))
    assert by_sequence.layer_kept < by_tensor.layer_kept < plain.layer_kept
    assert apart(stages, context=2)[0].layer_kept < plain.layer_kept


def test_distributed_optimizer_and_offload_save_memory(apart, plan_32b):
    whole = apart(plan_of, "experiment=oreal_32b", "parallel.distributed_optimizer=false")
    split = plan_32b
    parts = {p.phase: p.parts for p in split.memory.phases if p.where == "stage 0"}
    unsplit = {p.phase: p.parts for p in whole.memory.phases if p.where == "stage 0"}
    name = "policy optimizer"
    assert unsplit["train policy"][name] == pytest.approx(8 * parts["train policy"][name], rel=1e-6)
    away = apart(plan_of, "experiment=oreal_32b", "parallel.offload=true")
    away_parts = {p.phase: p.parts for p in away.memory.phases if p.where == "stage 0"}
    assert "reward model optimizer" not in away_parts["train policy"] and name in away_parts["train policy"]
    assert away.memory.worst.total < split.memory.worst.total


def test_fp8_changes_weight_bytes_and_product_seconds(apart, plan_32b):
    """Linear layers are 95% of the 32B model; policy and reward model also keep them transposed."""
    fp8 = apart(plan_of, "experiment=oreal_32b", "fp8=blockwise")
    whole, quick = ({p.phase: p.parts for p in plan.memory.phases if p.where == "stage 1"} for plan in (plan_32b, fp8))
    ratio = {name: quick["train policy"][name] / whole["train policy"][name] for name in whole["train policy"]}
    assert ratio["policy weights"] == pytest.approx(1 + 0.952, abs=0.01) == ratio["reward model weights"]
    assert ratio["reference weights"] == pytest.approx(1 + 0.952 / 2, abs=0.01)
    assert ratio["policy gradients"] == ratio["policy optimizer"] == 1
    # Linear layers at 0.75 x 1979 instead of 989 TFLOP/s; attention and the output layer as before.
    for phase in ("score", "train policy", "train reward model"):
        assert 0.66 < fp8.seconds[phase] / plan_32b.seconds[phase] < 0.8
    # FP8 copies of the weights leave a colocated server less room.
    assert fp8.memory.kv_cache.tokens < plan_32b.memory.kv_cache.tokens
    kept = apart(plan_of, "experiment=oreal_32b", "fp8=blockwise", "fp8.policy.parameters=true")
    (parts,) = [p.parts for p in kept.memory.phases if (p.where, p.phase) == ("stage 1", "train policy")]
    assert parts["policy weights"] == pytest.approx(whole["train policy"]["policy weights"], rel=0.01)


def test_fp8_servers_have_more_room_and_need_some_to_publish(apart):
    asked = ("experiment=oreal_32b", "rollout=sglang_disaggregated", "rollout.sglang.num_servers=4")
    plain, fp8 = (
        apart(plan_of, *asked, "rollout.sglang.tensor=8", f"rollout.sglang.dtype={dtype}") for dtype in ("null", "fp8")
    )
    (before,) = [p.parts for p in plain.memory.phases if p.where == "server"]
    generating, publishing = [p.parts for p in fp8.memory.phases if p.where == "server"]
    assert generating["served weights"] == pytest.approx(before["served weights"] * (1 - 0.952 / 2), rel=0.01)
    assert fp8.memory.kv_cache.tokens > plain.memory.kv_cache.tokens
    assert publishing["arriving weights"] == pytest.approx(before["served weights"] * 0.952, rel=0.01)
    assert fp8.seconds["generate"] < plain.seconds["generate"]


def test_plan_that_does_not_fit_names_the_first_change(apart):
    plan, change = apart(
        plan_and_first_change,
        "experiment=oreal_32b",
        "parallel.recompute=none",
        "parallel.distributed_optimizer=false",
    )
    assert plan.memory.verdict == "does not fit"
    assert "H100 80GB has 79.6 GiB" in plan.memory.problems[0]
    assert change is not None
    overrides, changed = change
    assert "parallel.distributed_optimizer=true" in overrides and changed.memory.problems == []


def test_devices_that_do_not_make_replicas_are_an_error():
    with pytest.raises(ConfigError, match=r"resources.trainer_devices = 120"):
        configuration("experiment=oreal_32b", "resources.trainer_devices=120")


@pytest.mark.end_to_end
def test_plan_command_prints_words_and_status():
    command = [sys.executable, "-m", "oreal_megatron.cli.plan"]
    fits = subprocess.run([*command, "experiment=oreal_7b"], capture_output=True, text=True)
    assert fits.returncode == 0, fits.stderr
    assert "fits" in fits.stdout and "KV cache: 16 x server" in fits.stdout
    full = subprocess.run(
        [*command, "experiment=oreal_7b", "parallel.recompute=none", "parallel.micro_batch_tokens=65536"],
        capture_output=True,
        text=True,
    )
    assert full.returncode == 1
    assert "does not fit" in full.stdout and "change first: parallel.recompute=" in full.stdout
    wrong = subprocess.run([*command, "experiment=oreal_33b"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "oreal_33b" in wrong.stderr and "Traceback" not in wrong.stderr


def test_step_time_is_within_a_third_of_a_published_one(apart):
    """NeMo-RL v0.5: GRPO of Qwen3-32B, 2,048 rollouts of 3,250 tokens, 376 s on 32 H100."""
    plan = apart(
        plan_of,
        "experiment=oreal_32b",
        "objective=grpo",
        "resources.trainer_devices=32",
        "rollout.sglang.num_servers=8",
        "rollout.sglang.tensor=4",
        "data.prompts_per_step=128",
        "rollout.sampling.max_new_tokens=6000",
        "parallel.tensor=4",
        "parallel.pipeline=4",
    )
    assert plan.step_seconds == pytest.approx(376, rel=0.35)


def searched(*overrides: str) -> list[Plan]:
    config = configuration(*overrides)
    return search(config, planner_of(config), num_devices(config, None), lambda done, of: None)


@pytest.mark.slow
def test_search_finds_layouts_that_fit_fastest_first(apart):
    plans = apart(searched, "experiment=oreal_7b", "resources.trainer_devices=8", "rollout.sglang.num_servers=4")
    assert len(plans) > 2 and all(plan.memory.problems == [] for plan in plans)
    seconds = [round(plan.step_seconds or 0.0) for plan in plans]
    assert seconds == sorted(seconds)
    assert len({plan.sizes.config.parallel for plan in plans}) == len(plans)


def split(*overrides: str) -> list[Plan]:
    config = configuration(*overrides)
    return splits(config, planner_of(config), 48, lambda done, of: None)


def test_splits_use_the_whole_budget_fastest_first(apart):
    plans = apart(split, "experiment=oreal_7b_disaggregated", "rollout.schedule=one_ahead", "rollout.max_staleness=1")
    devices = [(plan.sizes.num_devices, plan.sizes.config.rollout.sglang.num_servers) for plan in plans]
    assert len(set(devices)) == len(devices) > 2
    tensor = plans[0].sizes.config.rollout.sglang.tensor
    assert all(trainer + servers * tensor == 48 and trainer % 8 == 0 for trainer, servers in devices)
    seconds = [plan.step_seconds for plan in plans]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]


def test_splits_of_servers_without_devices_of_their_own_are_refused():
    with pytest.raises(ConfigError, match="rollout=sglang_disaggregated"):
        split("experiment=oreal_7b")


def test_measured_figures_replace_assumed_ones(finished, tmp_path):
    measured = read_measured(finished)
    assert measured.num_steps >= 1 and {"generate", "total"} <= measured.seconds.keys()
    config = configuration("experiment=arithmetic")
    assert assumed_workload(config, measured.mean_response_tokens).mean_response_tokens == measured.mean_response_tokens
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_measured(tmp_path)


def test_commands_import_no_torch():
    names = "arguments, convert, doctor, plan, submit, train, verify"
    code = f"import sys; from oreal_megatron.cli import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
