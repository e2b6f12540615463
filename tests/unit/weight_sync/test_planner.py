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
    ServerRank,
    TrainerLayout,
    balance,
    buckets,
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
def trainers(draw) -> TrainerLayout:
    pipeline = draw(st.sampled_from([1, 2, 4]))
    layout = Layout(
        tensor=draw(st.sampled_from([1, 2, 4])),
        pipeline=pipeline,
        virtual=draw(st.sampled_from([1, 2])) if pipeline == 2 else 1,
        vocabulary_multiple=draw(st.sampled_from([1, 8])),
    )
    return TrainerLayout(layout, context=draw(st.integers(1, 2)), data=draw(st.integers(1, 3)))


engines = st.builds(
    SGLangLayout,
    count=st.integers(1, 3),
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
    """What each global rank holds, by Megatron's name."""
    held: dict[int, dict[str, np.ndarray]] = {rank: {} for rank in range(trainer.num_ranks)}
    for shard in shards(table, trainer.model, geometry.num_layers):
        parts = []
        for box in shard.boxes:
            part = np.zeros(box.shape, dtype=np.int64)
            for copy in shard.entry.sources(box):
                columns = (slice(*copy.box.columns),) if copy.box.columns else ()
                part[slice(*copy.at)] = weights[copy.source][(slice(*copy.box.rows), *columns)]
            parts.append(part)
        for rank in trainer.replicas(shard.pipeline_rank, shard.tensor_rank):
            held[rank][shard.entry.name] = np.concatenate(parts)
    return held


def served(weights, geometry, layout, rank) -> dict[str, np.ndarray]:
    """What an SGLang rank holds: cut from whole tensors the way SGLang's own weight loaders do."""
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


CASES = given(models(), trainers(), engines, st.integers(1, 200))
OPTIONS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}


@settings(max_examples=40, **OPTIONS)
@CASES
def test_every_server_rank_gets_exactly_its_shard_once(geometry, trainer, layout, bucket):
    carry_out(geometry, trainer, layout, bucket)


@pytest.mark.slow
@settings(max_examples=1000, **OPTIONS)
@CASES
def test_every_server_rank_gets_exactly_its_shard_once_in_many_layouts(geometry, trainer, layout, bucket):
    carry_out(geometry, trainer, layout, bucket)


def carry_out(geometry, trainer, layout, bucket):
    """Plans, moves every rectangle in buckets, and compares with shards that were cut another way."""
    try:
        trainer.model.check(geometry)
        layout.check(geometry)
    except ValueError:
        return
    table = family_of(geometry).table(geometry, "causal")
    weights = huggingface_weights(table)
    held = trainer_shards(table, geometry, trainer, weights)
    plan = plan_resharding(table, geometry, trainer, layout)
    needed = 0
    for receiver in (ServerRank(e, r) for e in range(layout.count) for r in range(layout.tensor)):
        tensors = plan.targets[receiver.rank]
        got = {tensor.name: np.zeros(tensor.shape, dtype=np.int64) for tensor in tensors}
        for sender, rectangles in plan.of_receiver(receiver).items():
            for item in (item for run in buckets(rectangles, bucket) for item in run):
                target = got[item.target][index(item.target_box)]
                assert not target.any(), "written twice"
                target[...] = held[sender][item.source][index(item.source_box)]
        expected = served(weights, geometry, layout, receiver.rank)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        for tensor in tensors:
            filled = max((part.at[1] for part in tensor.parts), default=0)
            assert not expected[tensor.name][filled:].any()
        needed += sum(int(np.count_nonzero(value)) for value in expected.values())
    assert plan.num_elements == needed
    # What ranks hold alike they send alike, up to a row each: a tensor is never cut within one.
    for stage in range(trainer.model.pipeline):
        for rank in range(trainer.model.tensor):
            shares = [plan.elements_by_sender[replica] for replica in trainer.replicas(stage, rank)]
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


def test_the_32b_setting_sends_each_byte_once_and_evenly():
    table = family_of(QWEN_32B).table(QWEN_32B, "causal")
    trainer = TrainerLayout(Layout(tensor=8, pipeline=4), data=4)
    plan = plan_resharding(table, QWEN_32B, trainer, SGLangLayout(count=8, tensor=8))
    norms = (2 * 64 + 1) * 5120
    parameters = sum(int(np.prod(origin.shape)) for origin in table.origins.values())
    # Once an engine, and the replicated norms once a rank.
    assert plan.num_elements == 8 * (parameters + 7 * norms)
    busiest, bound = balance(plan, trainer)
    assert bound <= busiest <= 1.001 * bound
    # Equal tensor parallelism on both sides: every receiver hears from one rank of each stage, or two where runs meet.
    senders = [len(plan.of_receiver(ServerRank(e, r))) for e in range(8) for r in range(8)]
    assert max(senders) <= 12


def test_a_colocated_receiver_is_sent_what_its_own_device_lacks():
    table = family_of(QWEN_32B).table(QWEN_32B, "causal")
    trainer = TrainerLayout(Layout(tensor=8, pipeline=4), data=4)
    layout = SGLangLayout(count=16, tensor=8)
    near = {ServerRank(e, r): e * 8 + r for e in range(16) for r in range(8)}
    plan = plan_resharding(table, QWEN_32B, trainer, layout, same_device=near)
    local = sum(item.num_elements for receiver, rank in near.items() for item in plan.sent.get((rank, receiver), ()))
    whole = plan_resharding(table, QWEN_32B, trainer, layout).num_elements
    assert plan.num_elements == whole
    assert local >= 0.24 * whole  # a stage of four, the same tensor rank


def test_what_does_not_split_is_said_at_once():
    with pytest.raises(ValueError, match=r"40 attention heads over an engine's 7 .*; 8 key-value heads .*; 27648 "):
        SGLangLayout(tensor=7).check(QWEN_32B)
