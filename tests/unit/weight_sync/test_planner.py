"""The resharding plan, carried out with numpy on random models and layouts, and counted for the 32B setting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.layout import Layout, shards
from oreal_megatron.weight_sync.planner import (
    Assignment,
    buckets,
    num_elements,
    ops_by_sender,
    plan_resharding,
)
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout

HEAD_DIM = 2


@st.composite
def models(draw) -> GeometryConfig:
    kind = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    return GeometryConfig(
        num_layers=4 * draw(st.integers(1, 2)),
        hidden_size=draw(st.sampled_from([4, 6])),
        ffn_hidden_size=8,
        num_attention_heads=8,
        num_query_groups=draw(st.sampled_from([1, 2, 4, 8])),
        head_dim=HEAD_DIM,
        vocab_size=draw(st.integers(5, 40)),
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied_embeddings=draw(st.booleans()),
        init_std=0.02,
    )


@st.composite
def trainers(draw) -> Layout:
    pipeline = draw(st.sampled_from([1, 2, 4]))
    return Layout(
        tensor=draw(st.sampled_from([1, 2, 4])),
        pipeline=pipeline,
        virtual=draw(st.sampled_from([1, 2])) if pipeline == 2 else 1,
        vocabulary_multiple=draw(st.sampled_from([1, 8])),
        context=draw(st.integers(1, 2)),
        data=draw(st.integers(1, 3)),
    )


servers = st.builds(
    SGLangLayout,
    tensor=st.sampled_from([1, 2, 4, 8]),
    vocabulary_multiple=st.sampled_from([8, 64]),
    feed_forward_multiple=st.sampled_from([1, 3]),
)


def huggingface_weights(table) -> dict[str, np.ndarray]:
    """Every element another number, none of them zero."""
    weights, first = {}, 1
    for name, origin in table.origins.items():
        size = int(np.prod(origin.shape))
        weights[name] = np.arange(first, first + size).reshape(origin.shape)
        first += size
    return weights


def trainer_shards(table, geometry, trainer, weights) -> dict[int, dict[str, np.ndarray]]:
    """The tensors of each global rank, by Megatron's name."""
    by_rank: dict[int, dict[str, np.ndarray]] = {rank: {} for rank in range(trainer.num_ranks)}
    for shard in shards(table, trainer, geometry.num_layers):
        parts = []
        for box in shard.boxes:
            part = np.zeros(box.shape, dtype=np.int64)
            for copy in shard.entry.sources(box):
                columns = (slice(*copy.box.columns),) if copy.box.columns else ()
                part[slice(*copy.at)] = weights[copy.source][(slice(*copy.box.rows), *columns)]
            parts.append(part)
        for rank in trainer.replicas(shard.pipeline_rank, shard.tensor_rank):
            by_rank[rank][shard.entry.name] = np.concatenate(parts)
    return by_rank


def served(weights, geometry, layout, rank) -> dict[str, np.ndarray]:
    """The tensors of an SGLang rank: cut from whole tensors as SGLang's own weight loaders do."""
    size, groups = layout.tensor, geometry.num_query_groups

    def rows(name, parts, index):
        return np.split(weights[name], parts)[index]

    def padded(name):
        missing = -len(weights[name]) % layout.vocabulary_multiple
        return np.split(np.pad(weights[name], ((0, missing), (0, 0))), size)[rank]

    def feed_forward(name, axis):
        missing = -weights[name].shape[axis] % (size * layout.feed_forward_multiple)
        margins = ((0, 0), (0, missing)) if axis else ((0, missing), (0, 0))
        return np.split(np.pad(weights[name], margins), size, axis=axis)[rank]

    kv = (groups, rank * groups // size) if size > groups else (size, rank)
    found = {"model.embed_tokens.weight": padded("model.embed_tokens.weight")}
    for layer in range(geometry.num_layers):
        at = f"model.layers.{layer}."
        for kind in ("weight", "bias") if geometry.qkv_bias else ("weight",):
            q, k, v = (f"{at}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            found[f"{at}self_attn.qkv_proj.{kind}"] = np.concatenate([rows(q, size, rank), rows(k, *kv), rows(v, *kv)])
        gate, up = (feed_forward(f"{at}mlp.{name}_proj.weight", 0) for name in ("gate", "up"))
        found[f"{at}mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
        found[f"{at}mlp.down_proj.weight"] = feed_forward(f"{at}mlp.down_proj.weight", 1)
        found[f"{at}self_attn.o_proj.weight"] = np.split(weights[f"{at}self_attn.o_proj.weight"], size, axis=1)[rank]
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if geometry.qk_norm else []
        found |= {f"{at}{norm}.weight": weights[f"{at}{norm}.weight"] for norm in norms}
    found["model.norm.weight"] = weights["model.norm.weight"]
    return found if geometry.tied_embeddings else found | {"lm_head.weight": padded("lm_head.weight")}


def index(box) -> tuple[slice, ...]:
    return (slice(*box.rows),) if box.columns is None else (slice(*box.rows), slice(*box.columns))


def elements_by_sender(assignment: Assignment, num_senders: int) -> np.ndarray:
    totals = np.zeros(num_senders, dtype=np.int64)
    for (sender, _), ops in assignment.items():
        totals[sender] += num_elements(ops)
    return totals


CASES = given(models(), trainers(), servers, st.integers(1, 3), st.integers(1, 200))
OPTIONS = {"suppress_health_check": [HealthCheck.too_slow], "derandomize": True}


@settings(max_examples=40, **OPTIONS)
@CASES
def test_plan_fills_every_server_rank_exactly_once(geometry, trainer, layout, num_servers, bucket):
    execute(geometry, trainer, layout, num_servers, bucket)


@pytest.mark.slow
@settings(max_examples=1000, **OPTIONS)
@CASES
def test_plan_fills_every_server_rank_in_many_layouts(geometry, trainer, layout, num_servers, bucket):
    execute(geometry, trainer, layout, num_servers, bucket)


def execute(geometry, trainer, layout, num_servers, bucket):
    """Plans, copies every rectangle in buckets, and compares with shards that were cut in another way."""
    try:
        trainer.check(geometry)
        layout.check(geometry)
    except ValueError:
        return
    table = family_of(geometry).table(geometry, "causal")
    weights = huggingface_weights(table)
    by_rank = trainer_shards(table, geometry, trainer, weights)
    plan = plan_resharding(table, geometry, trainer, layout)
    assignment = plan.assign(num_servers)
    needed = 0
    for receiver in range(num_servers * layout.tensor):
        rank = receiver % layout.tensor
        tensors = plan.targets[rank]
        got = {tensor.name: np.zeros(tensor.shape, dtype=np.int64) for tensor in tensors}
        for sender, ops in ops_by_sender(assignment, receiver).items():
            for op in (op for run in buckets(ops, bucket) for op in run):
                target = got[op.target][index(op.target_box)]
                assert not target.any(), "written twice"
                target[...] = by_rank[sender][op.source][index(op.source_box)]
        expected = served(weights, geometry, layout, rank)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        for tensor in tensors:
            filled = max((part.at[1] for part in tensor.parts), default=0)
            assert not expected[tensor.name][filled:].any()
        needed += sum(int(np.count_nonzero(value)) for value in expected.values())
    totals = elements_by_sender(assignment, trainer.num_ranks)
    assert num_servers * plan.num_elements == totals.sum() == needed
    # Ranks that hold the same elements send equal shares, up to a row of each kind: a row is never cut.
    for stage in range(trainer.pipeline):
        for rank in range(trainer.tensor):
            shares = totals[list(trainer.replicas(stage, rank))]
            kinds = 8 * max(geometry.ffn_hidden_size, geometry.num_attention_heads * HEAD_DIM, geometry.hidden_size)
            assert max(shares) - min(shares) <= kinds


QWEN_32B = GeometryConfig(
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=27648,
    num_attention_heads=40,
    num_query_groups=8,
    head_dim=128,
    vocab_size=152064,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    tied_embeddings=False,
    init_std=0.02,
)


TRAINER_32B = Layout(tensor=8, pipeline=4, data=4)


@pytest.fixture(scope="module")
def plan_32b():
    table = family_of(QWEN_32B).table(QWEN_32B, "causal")
    return plan_resharding(table, QWEN_32B, TRAINER_32B, SGLangLayout(tensor=8))


def test_plan_of_32b_sends_each_byte_once_and_evenly(plan_32b):
    norms = (2 * 64 + 1) * 5120
    origins = family_of(QWEN_32B).table(QWEN_32B, "causal").origins
    parameters = sum(int(np.prod(origin.shape)) for origin in origins.values())
    # Replicated norms go to each of a server's ranks.
    assert plan_32b.num_elements == parameters + 7 * norms
    assignment = plan_32b.assign(8)
    # The weights of a stage are on its own ranks only, so no sender can have less than the mean of its stage.
    by_stage = elements_by_sender(assignment, plan_32b.num_senders).reshape(4, -1)
    assert by_stage.max() <= 1.001 * by_stage.mean(axis=1).max()
    # With equal tensor parallelism, a receiver takes from one rank of each stage, or two where their runs meet.
    assert max(len(ops_by_sender(assignment, receiver)) for receiver in range(64)) <= 12


def test_plan_sends_colocated_receivers_their_own_device_first(plan_32b):
    near = {receiver: receiver for receiver in range(128)}
    assignment = plan_32b.assign(16, same_device=near)
    local = sum(num_elements(assignment.get((rank, receiver), ())) for receiver, rank in near.items())
    whole = 16 * plan_32b.num_elements
    assert elements_by_sender(assignment, 128).sum() == whole
    assert local >= 0.24 * whole  # a stage of four, the same tensor rank


def test_plan_serves_transports_and_audit_of_any_number_of_servers(plan_32b):
    """One plan, several assignments: a server rank is sent the same elements whatever the number of servers."""

    def elements(num_servers):
        totals = np.zeros((num_servers, 8), dtype=np.int64)
        for (_, receiver), ops in plan_32b.assign(num_servers).items():
            totals[divmod(receiver, 8)] += num_elements(ops)
        return totals

    np.testing.assert_array_equal(elements(3), elements(1).repeat(3, axis=0))


def test_sglang_layout_lists_all_sizes_that_do_not_split():
    with pytest.raises(ValueError, match=r"rollout\.sglang\.tensor = 7: ") as error:
        SGLangLayout(tensor=7).check(QWEN_32B)
    for size in ("40 attention heads", "27648", "152064"):
        assert size in str(error.value)
    with pytest.raises(ValueError, match=r"rollout\.sglang\.tensor = 20: .*8"):
        SGLangLayout(tensor=20).check(QWEN_32B)  # 8 query groups, neither split nor copied evenly


def test_sglang_layout_accepts_columns_that_padding_makes_divisible():
    geometry = QWEN_32B.model_copy(update={"ffn_hidden_size": 27650})
    with pytest.raises(ValueError, match="27650"):
        SGLangLayout(tensor=8).check(geometry)
    SGLangLayout(tensor=8, feed_forward_multiple=32).check(geometry)
