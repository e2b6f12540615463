"""Scaled rotary embeddings, and Mistral, against transformers: conversion both ways, packed rows, cached decoding."""

from __future__ import annotations

import json

import pytest
import torch

from oreal_megatron.config import SamplingConfig
from oreal_megatron.conversion.convert import to_huggingface, to_megatron
from oreal_megatron.conversion.huggingface import config_json, geometry_of, max_positions, read_model, served_config
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.data.packing import PackedSequence, pack
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.types import GenerationRequest
from tests.tiny_models import LOGPROB_ROUNDING, as_policy, save_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 3.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0}
CASES = {
    "qwen2-yarn": ("qwen2", YARN),
    "qwen3-yarn-attention": ("qwen3", {**YARN, "attention_factor": 1.7, "beta_fast": 8.0, "truncate": False}),
    "llama-yarn-mscale": ("llama", {**YARN, "mscale": 0.8, "mscale_all_dim": 0.3, "beta_slow": 2.0}),
    "llama-llama3": ("llama", {**LLAMA3, "high_freq_factor": 4.0}),
    "llama-linear": ("llama", {"rope_type": "linear", "factor": 2.5}),
    "mistral": ("mistral", {"rope_type": "default"}),
}


def transformers_logprobs(directory, tokens):
    """Log-probabilities of tokens 1 to the last."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        rows = AutoModelForCausalLM.from_pretrained(directory).eval()(torch.tensor([tokens])).logits[0, :-1]
    return rows.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def tiny(path, case):
    family, rope = CASES[case]
    more = {"sliding_window": None} if family == "mistral" else {}
    return save_tiny(path, family, tied=False, rope_parameters={"rope_theta": 5000.0, **rope}, **more)


@pytest.mark.parametrize("case", CASES)
def test_scaled_rope_has_the_logprobs_of_transformers(tmp_path, single_process, case):
    directory = tiny(tmp_path / "hf", case)
    policy = as_policy(directory, single_process, max_sequence_length=256)
    tokens = torch.randint(0, 120, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    sequence = PackedSequence(id="0", prompt_ids=tuple(tokens[:1]), response_ids=tuple(tokens[1:]))
    batch = pack([sequence, sequence], torch.device("cpu"))
    (values,) = score(policy, [batch], lambda output, b: output[b.predicting, 0].clone(), single_process)
    torch.testing.assert_close(
        values, transformers_logprobs(directory, tokens).repeat(2), atol=LOGPROB_ROUNDING, rtol=0
    )
    engine = EmbeddedEngine(lambda: CachedDecoder(policy, single_process, 120), stop_token_id=121, batch_size=2)
    # Prompts of two lengths: the shorter one is padded, so its cache slots are not its positions.
    requests = [GenerationRequest(prompt_ids=tuple(tokens[:n]), seed=n, max_new_tokens=60) for n in (90, 150)]
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=60)
    ((_, completions),) = engine.generate([requests], sampling)
    for request, completion in zip(requests, completions, strict=True):
        whole = [*request.prompt_ids, *completion.token_ids]
        expected = transformers_logprobs(directory, whole)[len(request.prompt_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=LOGPROB_ROUNDING, rtol=0)


@pytest.mark.parametrize("case", ["qwen2-yarn", "mistral"])
def test_scaling_and_family_survive_a_conversion_there_and_back(tmp_path, case):
    source = tiny(tmp_path / "hf", case)
    to_megatron(source, tmp_path / "megatron", Layout(tensor=2))
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert geometry_of(tmp_path / "back") == geometry_of(source)
    assert read_model(tmp_path / "back").family.name == CASES[case][0]
    tokens = list(range(100))
    assert transformers_logprobs(tmp_path / "back", tokens).equal(transformers_logprobs(source, tokens))


def changed(directory, **keys):
    """Directory after these keys of config.json were set, or removed where they are None."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


def test_old_and_new_spellings_of_a_scaling_are_one_geometry(tmp_path):
    directory = tiny(tmp_path / "hf", "qwen2-yarn")
    new = geometry_of(directory)
    changed(directory, rope_parameters=None, rope_theta=5000.0)
    # Qwen's own instructions: the original length is that of max_position_embeddings, which stays.
    for old in ({"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4, "beta_fast": None}):
        changed(directory, rope_scaling=old, max_position_embeddings=64)
        assert geometry_of(directory) == new
        assert max_positions(read_model(directory)) == 256
    # A server is configured for the whole length, and scales from the original one.
    served = served_config(str(directory), new, dtype="float32", fp8=False, max_positions=256, stop_token_id=7)
    assert served["max_position_embeddings"] == 256
    assert served["rope_scaling"]["original_max_position_embeddings"] == 64


def test_scaling_of_a_geometry_without_directory_is_that_of_its_config_json(tmp_path):
    geometry = geometry_of(tiny(tmp_path / "hf", "llama-yarn-mscale"))
    written = config_json(geometry, "causal", dtype="float32", max_positions=256)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert geometry_of(tmp_path).rope_scaling == geometry.rope_scaling


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' are not supported, since its frequencies change"),
        ({"rope_type": "longrope"}, "supported are default, linear, llama3 and yarn"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({**LLAMA3}, "rope_type llama3 needs high_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "rope_type linear has no beta_fast"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor: Input should be greater than or equal to 1"),
        ({"rope_type": "yarn", "factor": 2.0, "attn_factor": 1.1}, "attn_factor: Extra inputs are not permitted"),
    ],
)
def test_other_scalings_are_refused_with_the_reason(tmp_path, rope, message):
    directory = changed(tiny(tmp_path / "hf", "llama-linear"), rope_parameters=rope)
    with pytest.raises(ValueError, match=message) as raised:
        geometry_of(directory)
    assert str(directory / "config.json") in str(raised.value)


@pytest.mark.parametrize("window", [None, 64])
def test_mistral_with_a_sliding_window_is_refused(tmp_path, window):
    directory = changed(tiny(tmp_path / "hf", "mistral"), sliding_window=window)  # absent, it is 4096
    with pytest.raises(ValueError, match=f"sliding_window = {window or 4096} is not supported for MistralForCausalLM"):
        geometry_of(directory)
