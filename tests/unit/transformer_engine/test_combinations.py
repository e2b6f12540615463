"""Everything at once: a combination is accepted where the sources' own asserts hold, and else refused, with its key.

What the asserts are is written down here a second time, from Transformer Engine's and SGLang's sources; those of
Megatron-Core are asked themselves.
"""

from __future__ import annotations

import itertools

import pytest
from megatron.core.transformer import TransformerConfig

from oreal_megatron.config import ConfigError, Fp8ModelConfig, GeometryConfig, parse_config
from oreal_megatron.machine.requirements import violations_of
from oreal_megatron.models.gpt import fp8_fields
from tests.unit.machine.test_requirements import QWEN_32B, SMOLLM2, WIDE, machine, run

GEOMETRIES = {
    "wide": WIDE,
    "Qwen2.5-32B": QWEN_32B,
    "SmolLM2": SMOLLM2,
    "Qwen2.5-7B": GeometryConfig(
        num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4, vocab_size=8
    ),
    "heads of 24": GeometryConfig(
        num_layers=4,
        hidden_size=384,
        ffn_hidden_size=1040,
        num_attention_heads=16,
        num_query_groups=4,
        head_dim=24,
        vocab_size=8,
    ),
}
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
CUDA = ["11.8", "12.0", "12.1", "12.4", "12.6", "12.8", "12.9", "13.0"]
RANKS = [1, 2, 4, 8]


def matrices(g: GeometryConfig, ranks: int) -> list[tuple[float, float]]:
    """Rows and columns of a layer's weights, as a tensor rank holds them."""
    head = g.attention_head_dim
    queries, keys = g.num_attention_heads * head, g.num_query_groups * head
    return [
        ((queries + 2 * keys) / ranks, g.hidden_size),
        (g.hidden_size, queries / ranks),
        (2 * g.ffn_hidden_size / ranks, g.hidden_size),
        (g.hidden_size, g.ffn_hidden_size / ranks),
    ]


def runs(recipe: str, capability: tuple[int, int], cuda: str) -> bool:
    version = tuple(map(int, cuda.split(".")))
    if recipe in ("delayed", "tensorwise"):
        return capability >= (8, 9) and version >= (12, 1)
    if recipe == "blockwise":
        return capability >= (9, 0) and version >= (12, 9)
    return (10, 0) <= capability < (12, 0) and version >= (12, 8)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_of_recipe_device_cuda_shape_and_tensor_ranks(composed, recipe):
    multiple = {"blockwise": 128, "mxfp8": 32}.get(recipe, 16)
    config = run(composed, f"fp8={recipe}", "fp8.reward_model=null", "fp8.reference=null")
    num_accepted = num_refused = 0
    for capability, cuda, ranks, (name, geometry) in itertools.product(CAPABILITIES, CUDA, RANKS, GEOMETRIES.items()):
        split = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": ranks})})
        found = violations_of(split, geometry, machine(capability, cuda))
        fits = all(size % multiple == 0 for matrix in matrices(geometry, ranks) for size in matrix)
        accepted = runs(recipe, capability, cuda) and fits
        assert (not found) == accepted, (recipe, capability, cuda, ranks, name, [str(v) for v in found])
        assert {violation.key for violation in found} <= {"fp8.policy.recipe"}
        num_accepted += accepted
        num_refused += not accepted
    assert num_accepted and num_refused


def test_of_device_shape_and_server_ranks_for_servers_in_fp8(composed):
    served = composed("rollout=sglang", "rollout.sglang.dtype=fp8")
    served["model"]["geometry"] = WIDE.model_dump()  # of a directory, whose shapes come later
    config = parse_config(served)
    num_accepted = 0
    for capability, ranks, (name, geometry) in itertools.product(CAPABILITIES, RANKS, GEOMETRIES.items()):
        sglang = config.rollout.sglang.model_copy(update={"tensor": ranks})
        asked = config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": sglang})})
        found = violations_of(asked, geometry, machine(capability))
        head = geometry.attention_head_dim
        # Each rank's queries, keys and values are matrices of their own; a key-value head may be on several ranks.
        parts = [*matrices(geometry, ranks)[1], head * max(geometry.num_query_groups / ranks, 1)]
        parts += matrices(geometry, ranks)[3]
        accepted = (8, 9) <= capability < (10, 0) and all(size % 128 == 0 for size in parts)
        assert (not found) == accepted, (capability, ranks, name, [str(violation) for violation in found])
        assert all(violation.key == "rollout.sglang.dtype" and "null" in violation.remedy for violation in found)
        num_accepted += accepted
    assert num_accepted


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_asserts_refuse_the_same_fp8_layers(composed, recipe):
    """Layers in bf16 at either end against recipe and pipeline stages; built with what a run builds with."""
    for first, last, stages in itertools.product((0, 1, 2, 3, 5), (0, 2, 3), (1, 2, 4)):
        fp8 = Fp8ModelConfig(
            recipe=recipe,
            format="hybrid",
            bf16_first_layers=first,
            bf16_last_layers=last,
            amax_history=16 if recipe == "delayed" else None,
            parameters=False,
        )
        try:
            # The schedule and its types are no question of FP8.
            TransformerConfig(
                num_layers=8,
                hidden_size=64,
                num_attention_heads=4,
                pipeline_model_parallel_size=stages,
                pipeline_dtype="unused",
                **fp8_fields(fp8, offload=False),
            )
            accepted = True
        except ValueError:
            accepted = False
        assert (not ours(composed, fp8, stages)) == accepted, (recipe, first, last, stages)


def ours(composed, fp8: Fp8ModelConfig, stages: int) -> list[str]:
    """What is refused before Megatron-Core is asked."""
    raw = composed(
        "model.implementation=transformer_engine",
        "model.dtype=bfloat16",
        "run.mode=replay",
        "run.replay_dir=/x",
        "model.geometry.num_layers=8",
        f"parallel.pipeline={stages}",
    )
    raw["fp8"]["policy"] = fp8.model_dump()
    try:
        config = parse_config(raw)
    except ConfigError as error:
        return [str(violation) for violation in error.violations]
    return [str(violation) for violation in violations_of(config, WIDE, machine((10, 0), "13.0"))]
