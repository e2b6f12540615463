"""The algebra: hand-computed tables, the inverse, splits, and the proof that nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import FAMILIES, qwen2
from oreal_megatron.conversion.layout import Layout, check_coverage, shards
from oreal_megatron.conversion.naming import checkpoint_name, stored_names
from oreal_megatron.conversion.rules import Box, RowRun, Same, Split, Table, build_table

GEOMETRY = GeometryConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=6,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=3,
    vocab_size=5,
)
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
Q, K, V = (f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv")


def test_queries_keys_and_values_interleave_by_group():
    entry = qwen2.FAMILY.table(GEOMETRY, "causal").entries[QKV]
    # Two heads of three rows a group, then the group's key, then its value.
    assert entry.runs == (
        RowRun(Q, 0, 6),
        RowRun(K, 0, 3),
        RowRun(V, 0, 3),
        RowRun(Q, 6, 12),
        RowRun(K, 3, 6),
        RowRun(V, 3, 6),
    )
    assert entry.shape == (24, 8)


def test_entry_sources_and_origin_sources_are_inverse():
    table = qwen2.FAMILY.table(GEOMETRY, "causal")
    copies = list(table.entries[QKV].sources(Box((4, 14), (0, 8))))
    assert [(c.source, c.box.rows, c.at) for c in copies] == [
        (Q, (4, 6), (0, 2)), (K, (0, 3), (2, 5)), (V, (0, 3), (5, 8)), (Q, (6, 8), (8, 10)),
    ]  # fmt: skip
    back = list(table.origins[K].sources(Box((1, 5), (0, 8))))
    assert [(c.source, c.box.rows, c.at) for c in back] == [(QKV, (7, 9), (0, 2)), (QKV, (18, 20), (2, 4))]


def test_entry_boxes_are_groups_halves_of_gate_and_up_or_columns():
    entries = qwen2.FAMILY.table(GEOMETRY, "causal").entries
    assert entries[QKV].boxes(2, 1) == (Box((12, 24), (0, 8)),)
    assert entries["decoder.layers.0.mlp.linear_fc1.weight"].boxes(2, 1) == (
        Box((3, 6), (0, 8)),
        Box((9, 12), (0, 8)),
    )
    assert entries["decoder.layers.0.mlp.linear_fc2.weight"].boxes(3, 2) == (Box((0, 8), (4, 6)),)
    assert entries["decoder.final_layernorm.weight"].boxes(2, 1) == (Box((0, 8), None),)
    with pytest.raises(ValueError, match=r"linear_fc2\.weight: 6 columns do not split evenly over 4"):
        entries["decoder.layers.0.mlp.linear_fc2.weight"].boxes(4, 0)


def test_padding_has_no_source_and_no_inverse():
    table = qwen2.FAMILY.table(GEOMETRY, "causal")
    embedding = table.entries["embedding.word_embeddings.weight"]
    assert Layout(tensor=2, vocabulary_multiple=4).padded_rows(embedding) == 8
    copies = list(embedding.sources(Box((4, 8), (0, 8))))
    assert [(c.box.rows, c.at) for c in copies] == [((4, 5), (0, 1))]
    assert table.origins["model.embed_tokens.weight"].shape == (5, 8)


def test_a_tied_output_layer_is_an_alias_on_both_sides():
    tied = GEOMETRY.model_copy(update={"tied_embeddings": True})
    table = qwen2.FAMILY.table(tied, "causal")
    assert "output_layer.weight" not in table.entries and "lm_head.weight" not in table.origins
    assert table.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert table.module_aliases == {"output_layer.weight": "embedding.word_embeddings.weight"}
    # A reward model has no output layer to tie.
    assert qwen2.FAMILY.table(tied, "scalar").origins["score.weight"].shape == (1, 8)


@st.composite
def models(draw):
    tensor = draw(st.sampled_from([1, 2, 3, 4]))
    groups = draw(st.sampled_from([1, 2, 3, 6])) * draw(st.sampled_from([1, tensor]))
    heads = groups * draw(st.integers(1, 3)) * tensor
    if groups % tensor and tensor % groups:
        groups = tensor
        heads = tensor * 2
    pipeline = draw(st.sampled_from([1, 2, 3]))
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
    geometry = GeometryConfig(
        num_layers=pipeline * virtual * draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=tensor * draw(st.integers(1, 5)),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 4])) * tensor,
        vocab_size=draw(st.integers(1, 50)),
        tied_embeddings=draw(st.booleans()),
    )
    return geometry, Layout(tensor, pipeline, virtual, draw(st.sampled_from([1, 8])))


@given(models(), st.sampled_from(FAMILIES), st.sampled_from(["causal", "scalar"]))
def test_every_element_lands_exactly_once_in_any_family_and_layout(model, family, head):
    geometry, layout = model
    layout.check(geometry)
    table = family.table(geometry, head)
    total = check_coverage(table, layout, geometry.num_layers)
    padding = sum(layout.padded_rows(entry) - entry.shape[0] for entry in table.entries.values())
    held = sum(s.num_elements for s in shards(table, layout, geometry.num_layers) if not s.is_copy)
    assert held == total + padding * geometry.hidden_size


def test_rules_that_use_rows_twice_are_refused():
    with pytest.raises(ValueError, match="a: the rules use rows 0 to 8 twice"):
        build_table([Same("a.weight", "a", ["hidden", "ffn"]), Same("b.weight", "a", ["hidden", "ffn"])], GEOMETRY)


def test_an_element_that_lands_nowhere_is_found():
    table = build_table([Same("a.weight", "a", ["hidden", "ffn"], Split.COLUMNS)], GEOMETRY)
    entry = table.entries["a.weight"]

    class Leaky(type(entry)):
        def boxes(self, size, rank, num_rows=None):
            return tuple(Box((0, 7), box.columns) for box in super().boxes(size, rank, num_rows))

    leaky = Leaky(entry.name, entry.layer, entry.shape, entry.split, entry.runs)
    with pytest.raises(ValueError, match="rows of a: 7 to 8 land nowhere"):
        check_coverage(Table({"a.weight": leaky}), Layout(), 1)


def test_names_of_local_and_fused_modules_are_the_same_tensor():
    fused = "decoder.layers.5.self_attention.linear_qkv.layer_norm_weight"
    assert checkpoint_name("decoder.layers.1.input_layernorm.weight", first_layer=4) == fused
    assert checkpoint_name("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", first_layer=4) == fused
    assert checkpoint_name("decoder.layers.0.pre_mlp_layernorm.weight") == (
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    )
    assert checkpoint_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
    assert stored_names(fused) == (
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", True),
        ("decoder.layers.input_layernorm.weight", True),
        (fused, False),
        ("decoder.layers.5.input_layernorm.weight", False),
    )


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(tensor=3), ["--tensor-parallel 3: 4 "]),
        (Layout(tensor=8), ["--tensor-parallel 8: 4 ", "--tensor-parallel 8: 6 "]),
        (Layout(pipeline=3), ["--pipeline-parallel 3: 2 "]),
        (Layout(pipeline=2, virtual=2), ["--virtual-pipeline 2: 2 "]),
        (Layout(virtual=2), ["--virtual-pipeline 2: needs --pipeline-parallel"]),
    ],
)
def test_layout_check_lists_every_size_that_does_not_split(layout, options):
    with pytest.raises(ValueError) as error:
        layout.check(GEOMETRY)
    for option in options:
        assert option in str(error.value)


def test_layout_check_refuses_query_groups_that_do_not_split():
    geometry = GEOMETRY.model_copy(update={"num_attention_heads": 6, "num_query_groups": 2, "ffn_hidden_size": 6})
    Layout(tensor=2).check(geometry)
    with pytest.raises(ValueError, match="--tensor-parallel 3: "):
        Layout(tensor=3).check(geometry)


def test_layout_check_refuses_fused_rows_that_are_cut_unevenly():
    """A query group over four ranks: each rank holds a part of a key, so four must divide the head dimension."""
    geometry = GEOMETRY.model_copy(update={"head_dim": 3, "num_query_groups": 1, "ffn_hidden_size": 8})
    with pytest.raises(ValueError, match="--tensor-parallel 4: 18 rows"):
        Layout(tensor=4).check(geometry)
    Layout(tensor=4).check(geometry.model_copy(update={"head_dim": 4}))


def test_layout_replicas_are_ordered_as_in_megatron():
    layout = Layout(tensor=2, pipeline=2, context=2, data=2)
    assert layout.num_ranks == 16
    assert layout.replicas(0, 1) == (1, 3, 5, 7) and layout.replicas(1, 0) == (8, 10, 12, 14)
