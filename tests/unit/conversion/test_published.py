"""--plan on published models: their public config.json and parameter counts, no weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron.conversion.huggingface import config_json, read_model
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.report import plan
from tests.conftest import ROOT

CONFIGS = Path(__file__).parent / "published"
# Elements of all tensors of the published checkpoints.
PARAMETERS = {
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}
LAYOUTS = (Layout(), Layout(tensor=4), Layout(tensor=8, pipeline=2), Layout(tensor=2, pipeline=4, virtual=2))


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_element_of_a_published_model_lands_exactly_once(name):
    model = read_model(CONFIGS / f"{name}.json")
    for layout in LAYOUTS:
        if model.geometry.num_attention_heads % layout.tensor or model.geometry.num_layers % (
            layout.pipeline * layout.virtual
        ):
            with pytest.raises(ValueError, match="does not split"):
                plan(model, layout)
            continue
        planned = plan(model, layout)
        assert planned.num_elements == PARAMETERS[name]
        assert planned.num_bytes == 2 * PARAMETERS[name]
        assert len(planned.shards) == layout.num_ranks
        layers = [
            layer for (_, rank), rank_shards in planned.shards.items() if rank == 0 for layer in layers_of(rank_shards)
        ]
        assert sorted(layers) == list(range(model.geometry.num_layers))
        # In addition to a copy of everything, ranks hold the norms on each tensor rank and nothing else.
        norms = sum(
            e.shape[0] for e in model.table.entries.values() if e.name.endswith("norm_weight") or len(e.shape) == 1
        )
        num_elements = sum(shard.num_elements for shards in planned.shards.values() for shard in shards)
        more = 2 * num_elements - planned.num_bytes
        biases = sum(e.shape[0] for e in model.table.entries.values() if e.name.endswith("qkv.bias"))
        assert more == 2 * (norms - biases) * (layout.tensor - 1)


def test_interleaved_stages_take_turns():
    shards = plan(read_model(CONFIGS / "Qwen2.5-32B.json"), Layout(pipeline=4, virtual=2)).shards
    assert layers_of(shards[1, 0]) == [*range(8, 16), *range(40, 48)]


def layers_of(shards):
    return sorted({shard.entry.layer for shard in shards if shard.entry.layer is not None})


@pytest.mark.end_to_end
def test_the_tool_prints_what_goes_where():
    command = [sys.executable, ROOT / "tools" / "hf_to_megatron.py", CONFIGS / "Qwen2.5-32B.json", "--plan"]
    shown = subprocess.run(
        [*command, "--tensor-parallel", "8", "--vocabulary-multiple", "128"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert "Qwen2ForCausalLM, 32.764B parameters in 771 tensors, 65.53 GB in bfloat16" in shown.stdout
    assert "every one of 32,763,876,352 elements lands exactly once" in shown.stdout
    assert "pp0 tp7        0-63" in shown.stdout
    assert "embedding.word_embeddings.weight: 512 rows of zeros behind the vocabulary's 152064" in shown.stdout
    refused = subprocess.run([*command, "--tensor-parallel", "3"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and "--tensor-parallel 3: 40 attention heads" in refused.stderr


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_written_from_a_geometry_describes_the_same_model(name, tmp_path):
    model = read_model(CONFIGS / f"{name}.json")
    written = config_json(model.geometry, "causal", dtype="bfloat16", max_positions=4096)
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = read_model(tmp_path)
    assert again.geometry == model.geometry.model_copy(update={"head_dim": model.geometry.attention_head_dim})
    assert (again.family, again.head) == (model.family, model.head)
