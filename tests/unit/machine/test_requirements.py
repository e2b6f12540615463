"""Every (recipe, capability, CUDA, shape, TP) of the libraries' own asserts, against described machines."""

from __future__ import annotations

import dataclasses

import pytest

from oreal_megatron.config import GeometryConfig, TrainConfig, parse_config
from oreal_megatron.config.fp8_recipes import RECIPES
from oreal_megatron.machine.probe import Machine, Part
from oreal_megatron.machine.requirements import check_machine, rank_dimensions, violations_of

A100, L40, H100, B200, RTX5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
CPU_ONLY = Machine(torch=Part("2.13.0+cpu"), cuda=None, devices=())
WIDE = GeometryConfig(
    num_layers=8, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=8, vocab_size=512
)
# Shapes of Qwen2.5-32B, and of SmolLM2-135M, whose widths are no multiples of 128.
QWEN_32B = GeometryConfig(
    num_layers=64, hidden_size=5120, ffn_hidden_size=27648, num_attention_heads=40, num_query_groups=8, vocab_size=8
)
SMOLLM2 = GeometryConfig(
    num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3, vocab_size=8
)


def machine(capability=H100, cuda="12.9", te="2.11.0", **more) -> Machine:
    parts = {"transformer_engine": Part(te) if te else Part(None, "ModuleNotFoundError: not here")} | more
    return Machine(torch=Part("2.13.0+cu129"), cuda=cuda, devices=(("GPU", capability),) * 8, **parts)


def run(composed, *overrides: str) -> TrainConfig:
    gpu = ("model.implementation=transformer_engine", "model.dtype=bfloat16", "run.mode=replay", "run.replay_dir=/x")
    return parse_config(composed(*gpu, *overrides))


def messages_of(config: TrainConfig, found: Machine, geometry: GeometryConfig = WIDE) -> list[str]:
    return [str(violation) for violation in violations_of(config, geometry, found)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_without_transformer_engine_names_its_installation(composed, recipe):
    config = run(composed, f"fp8={recipe}")
    for found, expected in (
        (machine(te=None, capability=B200, cuda="13.0"), "transformer-engine[pytorch,core_cu13]>=2.9,<2.12"),
        (machine(te=None, capability=B200, cuda="12.9"), "transformer-engine[pytorch,core_cu12]>=2.9,<2.12"),
        (machine(te="2.20.0", capability=B200), "2.20.0"),
        (machine(te="2.8.0", capability=B200), "2.8.0"),
        (CPU_ONLY, "2.13.0+cpu"),
        (dataclasses.replace(machine(), devices=()), "CUDA_VISIBLE_DEVICES"),
    ):
        messages = messages_of(config, found)
        for key in ("model.implementation", "fp8.policy.recipe", "fp8.reward_model.recipe", "fp8.reference.recipe"):
            assert any(m.startswith(key) and expected in m and "pip install" in m for m in messages), (key, messages)


@pytest.mark.parametrize(
    ("recipe", "runs_on"),
    [
        ("delayed", {L40, H100, B200, RTX5090}),
        ("tensorwise", {L40, H100, B200, RTX5090}),
        ("blockwise", {H100, B200, RTX5090}),
        ("mxfp8", {B200}),
    ],
)
@pytest.mark.parametrize("capability", [A100, L40, H100, B200, RTX5090])
def test_capability(composed, recipe, runs_on, capability):
    messages = messages_of(run(composed, f"fp8={recipe}", "fp8.reference=null"), machine(capability))
    if capability in runs_on:
        assert not messages
    else:
        assert len(messages) == 2  # policy and reward model, each with its key
        assert f"sm{capability[0]}{capability[1]}" in messages[0] and "fp8.policy=null" in messages[0]


@pytest.mark.parametrize(
    ("recipe", "too_old", "enough"),
    [
        ("delayed", "12.0", "12.1"),
        ("tensorwise", "11.8", "12.1"),
        ("blockwise", "12.8", "12.9"),
        ("mxfp8", "12.6", "12.8"),
    ],
)
def test_cuda_version(composed, recipe, too_old, enough):
    config = run(composed, f"fp8={recipe}", "fp8.reward_model=null", "fp8.reference=null")
    assert not messages_of(config, machine(B200, enough))
    (message,) = messages_of(config, machine(B200, too_old))
    assert f"needs CUDA {enough}" in message and too_old in message


@pytest.mark.parametrize(
    ("recipe", "tensor", "changed", "expected"),
    [
        ("tensorwise", 1, {}, ""),
        ("tensorwise", 1, {"ffn_hidden_size": 4104}, "ffn_hidden_size is 4104, tensorwise needs a multiple of 16"),
        ("delayed", 8, {"ffn_hidden_size": 4160}, "ffn_hidden_size is 520 on each of 8 tensor ranks"),
        ("delayed", 4, {"ffn_hidden_size": 4160}, ""),
        ("mxfp8", 4, {"ffn_hidden_size": 4160}, "ffn_hidden_size is 1040 on each of 4 tensor ranks"),
        ("mxfp8", 2, {"ffn_hidden_size": 4160}, ""),
        ("mxfp8", 1, {"hidden_size": 1040, "head_dim": 64}, "hidden_size is 1040, mxfp8 needs a multiple of 32"),
        ("blockwise", 8, {}, ""),
        ("blockwise", 16, {}, "attention heads x head_dim is 64 on each of 16 tensor ranks"),
        ("blockwise", 2, {"ffn_hidden_size": 4160}, "ffn_hidden_size is 2080 on each of 2 tensor ranks"),
        ("blockwise", 1, {"num_query_groups": 1, "head_dim": 96}, "queries, keys and values is 1728"),
    ],
)
def test_shape(composed, recipe, tensor, changed, expected):
    config = run(composed, f"fp8={recipe}", "fp8.reward_model=null", "fp8.reference=null")
    layout = config.parallel.model_copy(update={"tensor": tensor})
    config = config.model_copy(update={"parallel": layout})
    messages = messages_of(config, machine(B200), WIDE.model_copy(update=changed))
    assert bool(messages) == bool(expected)
    assert all("fp8.policy=null" in message for message in messages)
    assert not expected or any(expected in message for message in messages), messages


@pytest.mark.parametrize("recipe", RECIPES)
def test_shape_of_32b_allows_every_recipe_on_8_tensor_ranks(composed, recipe):
    config = run(composed, f"fp8={recipe}", "fp8.reward_model=null", "fp8.reference=null")
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": 8})})
    assert not messages_of(config, machine(B200), QWEN_32B)
    assert rank_dimensions(QWEN_32B, 8)["ffn_hidden_size"] == 3456


def test_shape_of_smollm2_allows_all_recipes_but_blockwise(composed):
    config = run(composed, "fp8=blockwise", "fp8.reward_model=null", "fp8.reference=null")
    messages = messages_of(config, machine(), SMOLLM2)
    (message,) = (m for m in messages if "hidden_size is 576" in m and "128" in m)
    for recipe in ("delayed", "tensorwise", "mxfp8"):
        assert f"fp8.policy.recipe={recipe}" in message
    assert not messages_of(run(composed, "fp8=tensorwise"), machine(), SMOLLM2)


def test_gpu_run_needs_a_gpu(composed):
    config = parse_config(composed("resources=h100", "resources.trainer_devices=1"))
    (message,) = messages_of(config, CPU_ONLY)
    assert message.startswith("resources.device = 'h100_80gb'") and "2.13.0+cpu" in message
    assert not messages_of(config, machine())


def test_bf16_layers_fit_a_pipeline_stage(composed):
    config = run(composed, "fp8=tensorwise", "fp8.policy.bf16_last_layers=3", "model.geometry.num_layers=4")
    layout = config.parallel.model_copy(update={"pipeline": 4})
    found = messages_of(config.model_copy(update={"parallel": layout}), machine())
    assert [m.split(" = ")[0] for m in found] == [
        f"fp8.{n}.bf16_last_layers" for n in ("policy", "reward_model", "reference")
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (machine(apex=Part("with fused weight gradients")), ""),
        (machine(apex=Part(None, "ImportError: the package of that name at /x/apex is not NVIDIA's")), "not NVIDIA's"),
        (CPU_ONLY, "2.13.0+cpu"),
    ],
)
def test_fused_weight_gradients_need_apex(composed, found, expected):
    config = parse_config(composed("parallel.fused_weight_gradients=true"))
    messages = messages_of(config, found)
    assert bool(messages) == bool(expected)
    assert all(expected in message and "parallel.fused_weight_gradients=false" in message for message in messages)


def test_violations_come_all_at_once(composed):
    config = run(composed, "fp8=mxfp8", "parallel.fused_weight_gradients=true")
    messages = messages_of(config, machine(H100, "12.6", apex=Part(None, "not installed")), SMOLLM2)
    keys = {message.split(" = ")[0] for message in messages}
    assert keys == {
        "parallel.fused_weight_gradients",
        *(f"fp8.{n}.recipe" for n in ("policy", "reward_model", "reference")),
    }
    assert sum(message.startswith("fp8.policy.recipe") for message in messages) == 2  # the device, and CUDA


def test_check_without_requirements_reads_nothing(composed):
    def unread(model):
        raise AssertionError("the model's directory was read")

    check_machine(parse_config(composed()), unread)
