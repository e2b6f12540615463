"""What is wrong with a checkpoint is said with file and tensor, and nothing half-written looks whole."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oreal_megatron.conversion import convert
from oreal_megatron.conversion.convert import Export, to_huggingface, to_megatron
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.weights import INDEX
from tests.conftest import ROOT
from tests.tiny_models import save_tiny
from tests.unit.conversion.test_round_trip import assert_same_bits


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "hf", "qwen2", tied=False, max_shard_size="60KB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "hf", "qwen2", tied=False)


def refused(source: Path, *messages: str, layout: Layout | None = None) -> None:
    """The conversion is refused with all of `messages`, and leaves nothing that has the target's name."""
    target = source.parent / "megatron"
    with pytest.raises(ValueError) as error:
        to_megatron(source, target, layout or Layout())
    for message in messages:
        assert message in str(error.value), error.value
    assert not target.exists()


def change(source: Path, **changed: torch.Tensor | None) -> None:
    """Tensors of a single-file directory replaced, or removed where None."""
    tensors = load_file(source / "model.safetensors") | {name: t for name, t in changed.items() if t is not None}
    kept = {name: t for name, t in tensors.items() if name not in changed or changed[name] is not None}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})


def set_config(source: Path, **changed: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changed))


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, INDEX, shard.name)


def test_a_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 8)
    refused(sharded, shard.name, "truncated")


def test_an_index_that_disagrees_with_the_shards(sharded):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    dropped = next(name for name, file in index["weight_map"].items() if file == files[1])
    index["weight_map"][moved] = files[1]
    del index["weight_map"][dropped]
    index["weight_map"]["model.layers.9.x"] = files[0]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(
        sharded,
        f"{moved} is listed in {files[1]}, and is in {files[0]}",
        f"{dropped} is in {files[1]}, and is not listed",
        "model.layers.9.x is listed in " + files[0] + ", and is nowhere",
    )


def test_a_broken_index(sharded):
    (sharded / INDEX).write_text("{")
    refused(sharded, INDEX, "not an index")


def test_weights_check_lists_all_wrong_tensors(single):
    change(
        single,
        **{
            "lm_head.weight": None,
            "model.layers.0.extra": torch.zeros(1),
            "model.norm.weight": torch.zeros(47),
            "model.layers.1.mlp.down_proj.weight": torch.zeros(48, 96, dtype=torch.int8),
        },
    )
    refused(
        single,
        "lm_head.weight is missing",
        "model.layers.0.extra (model.safetensors) is unexpected",
        "model.norm.weight (model.safetensors) has shape [47], config.json says [48]",
        "model.layers.1.mlp.down_proj.weight (model.safetensors) has dtype I8",
    )


def test_parts_of_one_tensor_in_two_dtypes(single):
    key = "model.layers.0.self_attn.k_proj.weight"
    change(single, **{key: load_file(single / "model.safetensors")[key].bfloat16()})
    refused(single, key, "differ in dtype")


def test_layers_in_two_dtypes(single):
    key = "model.layers.1.mlp.down_proj.weight"
    change(single, **{key: load_file(single / "model.safetensors")[key].bfloat16()})
    refused(single, key, "same dtype")


def test_a_tied_output_layer_that_is_not_the_embedding(tmp_path):
    source = save_tiny(tmp_path / "hf", "llama", tied=True)
    change(source, **{"lm_head.weight": torch.ones(120, 48)})
    refused(source, "ties lm_head.weight to model.embed_tokens.weight", "differ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rotary embeddings of rope_type 'dynamic'"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config = {'quant_method': 'fp8'} is not supported",
        ),
        ({"architectures": ["Qwen2ForTokenClassification"]}, "2 labels"),
    ],
)
def test_a_model_that_is_not_supported(single, changed, message):
    set_config(single, **changed)
    refused(single, str(single / "config.json"), message)


def test_no_config_no_weights_or_another_format(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, INDEX, "pytorch_model.bin")
    (single / "config.json").unlink()
    refused(single, "config.json")


def test_heads_that_tensor_parallelism_cannot_split(single):
    refused(single, "--tensor-parallel 3: 4 attention heads", layout=Layout(tensor=3))


def test_a_target_that_is_not_empty(single, tmp_path):
    target = tmp_path / "megatron"
    target.mkdir()
    to_megatron(single, target, Layout())  # an empty one is fine
    with pytest.raises(ValueError, match="exists and is not empty"):
        to_megatron(single, target, Layout())
    (tmp_path / "back").write_text("a file")
    with pytest.raises(ValueError, match="exists and is not empty"):
        to_huggingface(target, tmp_path / "back")


@pytest.fixture
def megatron(single: Path, tmp_path: Path) -> Path:
    to_megatron(single, tmp_path / "checkpoint", Layout(tensor=2))
    return tmp_path / "checkpoint"


def refused_export(megatron: Path, *messages: str, **options: object) -> None:
    target = megatron.parent / "back"
    with pytest.raises(ValueError) as error:
        to_huggingface(megatron, target, **options)  # type: ignore[arg-type]
    for message in messages:
        assert message in str(error.value), error.value
    assert not target.exists()


def test_a_megatron_checkpoint_that_is_not_whole(megatron):
    file = megatron / "__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    refused_export(megatron, f"__1_0.distcp is truncated: {size - 100} of {size} bytes")
    file.unlink()
    refused_export(megatron, "__1_0.distcp is missing")
    (megatron / "metadata.json").unlink()
    refused_export(megatron, "metadata.json")


def test_a_damaged_megatron_file(megatron):
    file = megatron / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[:200] = bytes(200)
    file.write_bytes(content)
    refused_export(megatron, "__0_0.distcp", "cannot be read")


def test_a_megatron_checkpoint_of_another_model(megatron, tmp_path):
    refused_export(
        megatron, "policy.embedding.word_embeddings.weight is missing", "prefixes in it: ['']", prefix="policy."
    )
    other = save_tiny(tmp_path / "other", "qwen2", tied=False, num_layers=3)
    refused_export(megatron, "decoder.layers.2.mlp.linear_fc2.weight is missing", assets=other)
    larger = save_tiny(tmp_path / "larger", "qwen2", tied=False, vocabulary=200)
    refused_export(
        megatron, "embedding.word_embeddings.weight has shape [120, 48], the model's is [200, 48]", assets=larger
    )
    tied = save_tiny(tmp_path / "tied", "qwen2", tied=True)
    refused_export(megatron, "output_layer.weight is unexpected", assets=tied)
    without_bias = save_tiny(tmp_path / "llama", "llama", tied=False)
    refused_export(megatron, "linear_qkv.bias is unexpected", assets=without_bias)


class Killed(BaseException):
    pass


def test_a_killed_conversion_goes_on_where_it_was(single, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(convert, "FILE_BYTES", 60_000)
    monkeypatch.setattr(convert, "SHARD_BYTES", 60_000)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for conversion, source, target in ((to_megatron, single, megatron), (to_huggingface, megatron, back)):
        arguments = (source, target, Layout(tensor=2)) if conversion is to_megatron else (source, target)
        done = []

        def kill(num_bytes: int, done: list[int] = done) -> None:
            done.append(num_bytes)
            if len(done) == 12:
                raise Killed

        with pytest.raises(Killed):
            conversion(*arguments, advance=kill)
        partial = target.with_name(target.name + ".partial")
        whole = {p.name: p.stat().st_mtime_ns for p in partial.iterdir() if p.suffix in (".distcp", ".safetensors")}
        assert not target.exists() and whole and list(partial.glob("*.unfinished"))
        conversion(*arguments)
        assert not partial.exists() and not list(target.glob("*.unfinished")) and not list(target.glob(".*json"))
        for name, time in whole.items():
            assert (target / name).stat().st_mtime_ns == time, f"{name} was whole, and was made again"
    assert_same_bits(single, back)


def test_another_source_does_not_go_on_with_what_a_killed_run_left(single, tmp_path):
    def kill(num_bytes: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        to_megatron(single, tmp_path / "megatron", Layout(), advance=kill)
    change(single, **{"model.norm.weight": torch.full((48,), 3.0)})
    to_megatron(single, tmp_path / "megatron", Layout())
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(single, tmp_path / "back")


def test_a_disk_without_room_is_refused_before_anything_is_written(single, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(Export, "num_bytes", usage.f_bavail * usage.f_frsize + 10**12)
    to_megatron(single, tmp_path / "megatron", Layout())
    with pytest.raises(ValueError, match=r"bytes are to be written, the disk has [\d,]+ free"):
        to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """One of tools/."""
    return subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@contextlib.contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """A limit that fails a write as a full disk does, and needs no disk to fill."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_write_leaves_no_target(single, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for conversion, arguments in ((to_megatron, (single, megatron, Layout())), (to_huggingface, (megatron, back))):
        with pytest.raises(OSError, match="was not made"):  # noqa: SIM117
            with files_limited_to(100_000):
                conversion(*arguments)
        assert not arguments[1].exists()
        conversion(*arguments)
        assert arguments[1].exists()
    assert_same_bits(single, back)


@pytest.mark.end_to_end
def test_the_tools_convert_verify_and_end_with_one_line(single, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert tool("hf_to_megatron", single, megatron).returncode == 0
    assert tool("megatron_to_hf", megatron, back).returncode == 0
    verified = tool("verify_checkpoint", back, megatron)
    assert verified.returncode == 0 and "are equal, bit for bit" in verified.stdout
    change(single, **{"model.norm.weight": torch.full((48,), 3.0)})
    verified = tool("verify_checkpoint", single, megatron)
    assert verified.returncode == 1 and "differs: decoder.final_layernorm.weight" in verified.stdout
    refused = tool("hf_to_megatron", single, megatron)
    assert refused.returncode == 1 and "is not empty" in refused.stderr and "Traceback" not in refused.stderr
