"""Reads config.json of a Hugging Face model directory, and writes config.json for a geometry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from oreal_megatron.config import SERVED_BLOCK, GeometryConfig, RopeScalingConfig
from oreal_megatron.conversion.families import all_families, family_of
from oreal_megatron.conversion.families.decoder import Family, Head
from oreal_megatron.conversion.rules import Table

_VARYING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model as config.json describes it."""

    path: Path
    """Directory of the model, or path of a config.json without weights."""
    family: Family
    head: Head
    geometry: GeometryConfig
    config: Mapping[str, Any]

    @cached_property
    def table(self) -> Table:
        return self.family.table(self.geometry, self.head)

    @property
    def dtype(self) -> str:
        """Dtype of the weights in config.json: float32, bfloat16 or float16."""
        return str(self.config.get("dtype", self.config.get("torch_dtype", "float32")))


def read_model(path: Path, *, is_served: bool = False) -> HuggingFaceModel:
    """Reads the config.json of a model directory, or a config.json.

    is_served: the directory is a server's, whose weights may be quantised; they are not read from it.

    Raises:
        ValueError: the file is missing, or the model is not supported; names the file, the key and the supported
            values.
    """
    file = path / "config.json" if path.is_dir() or path.suffix != ".json" else path
    if not file.is_file():
        raise ValueError(f"{path}: the directory has no config.json")
    try:
        config = json.loads(file.read_text())
        family, head = _family(file, config, is_served=is_served)
        geometry = _geometry(file, config, family)
    except KeyError as error:
        raise ValueError(f"{file}: key {error} is missing") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return HuggingFaceModel(path, family, head, geometry, config)


def geometry_of(path: Path, *, is_served: bool = False) -> GeometryConfig:
    """Returns the geometry of a language model's directory, as named by `model.path`. is_served: see `read_model`.

    Raises:
        ValueError: see `read_model`; or the directory holds a reward model.
    """
    model = read_model(path, is_served=is_served)
    if model.head != "causal":
        raise ValueError(
            f"model.path = {path}: the directory holds a reward model ({model.family.architectures[model.head]}). "
            "Name the directory of a language model."
        )
    return model.geometry


def _family(file: Path, config: Mapping[str, Any], *, is_served: bool) -> tuple[Family, Head]:
    architecture = (config.get("architectures") or ["?"])[0]
    known = {name: (family, head) for family in all_families() for head, name in family.architectures.items()}
    if architecture not in known:
        raise ValueError(f"{file}: {architecture} is not supported; supported are {', '.join(known)}")
    family, head = known[architecture]
    if (method := config.get("quantization_config")) is not None and not is_served:
        raise ValueError(
            f"{file}: quantization_config = {method!r} is not supported, weights are read as they are. Name a "
            "directory without quantisation; where its weights are plain, remove the key."
        )
    for key, value in family.only.items():
        if (found := config.get(key, family.absent.get(key, value))) != value:
            raise ValueError(f"{file}: {key} = {found!r} is not supported for {architecture}, only {value!r}")
    # transformers gives a classifier two labels by default.
    if head == "scalar" and (labels := config.get("num_labels") or len(config.get("id2label", "ab"))) != 1:
        raise ValueError(
            f"{file}: the model has {labels} labels, a reward model has one. Set id2label to a single entry."
        )
    return family, head


def _geometry(file: Path, config: Mapping[str, Any], family: Family) -> GeometryConfig:
    rope_theta, rope_scaling = _rope(file, config)
    heads = config["num_attention_heads"]
    return GeometryConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim"),
        vocab_size=config["vocab_size"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _rope(file: Path, config: Mapping[str, Any]) -> tuple[float, RopeScalingConfig | None]:
    """Returns base and scaling of the rotary embeddings: `rope_scaling`, or transformers 5's `rope_parameters`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {key: value for key, value in given.items() if value is not None}
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    if (share := rope.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise ValueError(f"{file}: partial_rotary_factor = {share} is not supported, only 1.0")
    if kind == "default":
        return theta, None
    if kind not in get_args(RopeScalingConfig.model_fields["rope_type"].annotation):
        varies = ", since its frequencies change with the length of a sequence" if kind in _VARYING_ROPE else ""
        raise ValueError(
            f"{file}: rotary embeddings of rope_type {kind!r} are not supported{varies}; supported are default, "
            "linear, llama3 and yarn"
        )
    if kind in ("llama3", "yarn"):
        longest = config["max_position_embeddings"]
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or longest
        if kind == "yarn":
            rope.setdefault("factor", longest / rope["original_max_position_embeddings"])
    try:
        return theta, RopeScalingConfig(rope_type=kind, **rope)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'keys'}: {problem['msg']}" for problem in error.errors()
        )
        raise ValueError(f"{file}: rotary embeddings {given} are not supported: {problems}") from error


def max_positions(model: HuggingFaceModel) -> int | None:
    """Returns the longest sequence that a model is made for, in tokens; None where config.json does not say it."""
    longest, scaling = model.config.get("max_position_embeddings"), model.geometry.rope_scaling
    if longest is None or scaling is None:
        return longest
    return max(longest, int(scaling.factor * (scaling.original_max_position_embeddings or longest)))


def config_json(geometry: GeometryConfig, head: Head, *, dtype: str, max_positions: int) -> dict[str, Any]:
    """Returns config.json for a model that has no directory, in the form that transformers 4 and 5 read."""
    family = family_of(geometry)
    config: dict[str, Any] = {
        "architectures": [family.architectures[head]],
        "model_type": family.name,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "initializer_range": geometry.init_std,
        "intermediate_size": geometry.ffn_hidden_size,
        "max_position_embeddings": max_positions,
        "num_attention_heads": geometry.num_attention_heads,
        "num_hidden_layers": geometry.num_layers,
        "num_key_value_heads": geometry.num_query_groups,
        "head_dim": geometry.attention_head_dim,
        "rms_norm_eps": geometry.norm_eps,
        "rope_theta": geometry.rope_theta,
        "tie_word_embeddings": geometry.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": geometry.vocab_size,
    }
    if geometry.rope_scaling is not None:
        config["rope_scaling"] = geometry.rope_scaling.parameters
    return config if head == "causal" else with_scalar_head(config)


def served_config(
    path: str | None, geometry: GeometryConfig, *, dtype: str, fp8: bool, max_positions: int, stop_token_id: int
) -> dict[str, Any]:
    """Returns the config.json that a server is started with.

    path: the policy's model directory; None if only its geometry is known. geometry: with vocab_size. dtype: dtype that
    the server computes in. fp8: the server holds linear layers in blocks of e4m3. stop_token_id: the only token that
    ends a response.
    """
    if path is None:
        config = config_json(geometry, "causal", dtype=dtype, max_positions=max_positions)
    else:
        config = dict(read_model(Path(path)).config)
        if geometry.rope_scaling is not None:
            # SGLang takes the longest sequence from here, whatever the scaling's factor.
            config["max_position_embeddings"] = max(max_positions, config.get("max_position_embeddings", 0))
            for name in ("rope_scaling", "rope_parameters"):
                if config.get(name):
                    config[name] = {**config[name], **geometry.rope_scaling.parameters}
    key = "dtype" if "dtype" in config else "torch_dtype"
    config |= {key: dtype, "vocab_size": geometry.vocab_size, "eos_token_id": stop_token_id}
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [SERVED_BLOCK, SERVED_BLOCK],
        }
    return config


def with_scalar_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a reward model with the decoder of `config`."""
    family = next(f for f in all_families() if f.name == config["model_type"])
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {**config, "architectures": [family.architectures["scalar"]], **labels}
