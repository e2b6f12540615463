"""The Megatron-Core policy against transformers on the same weights: logits, log-probabilities, generation."""

from __future__ import annotations

import pytest
import torch

from oreal_megatron.config import SamplingConfig
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.data.packing import PackedSequence, pack
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.types import FinishReason, GenerationRequest
from tests.tiny_models import LOGPROB_ROUNDING, as_policy, save_tiny

CPU = torch.device("cpu")
STOP = 7


def random_prompts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 120, (n,), generator=generator).tolist()) for n in lengths]


def logits_of(reference, token_ids):
    with torch.no_grad():
        return reference(torch.tensor([token_ids])).logits[0].float()


def test_packed_logprobs_and_entropies_are_those_of_transformers(pair, single_process):
    reference, policy = pair
    prompts, responses = random_prompts([3, 9, 1, 4]), random_prompts([8, 2, 5, 1], seed=2)
    batch = pack(
        [
            PackedSequence(id=str(i), prompt_ids=p, response_ids=r)
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ],
        CPU,
    )
    (values,) = score(policy, [batch], lambda output, b: output[b.predicting].clone(), single_process)
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logprobs = logits_of(reference, prompt + response).log_softmax(-1)[len(prompt) - 1 : -1]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        expected.append(torch.stack([logprobs.gather(1, torch.tensor(response)[:, None])[:, 0], entropy], -1))
    torch.testing.assert_close(values, torch.cat(expected), atol=LOGPROB_ROUNDING, rtol=0)


def generated(engine, requests, sampling):
    """All units of an engine, in the order of the requests."""
    units = engine.units(requests)
    found = engine.generate([[requests[i] for i in unit] for unit in units], sampling)
    return [c for _, c in sorted((i, c) for u, part in found for i, c in zip(units[u], part, strict=True))]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_generation_is_that_of_transformers(pair, single_process, batch_size):
    reference, policy = pair
    prompts = random_prompts([5, 2, 9, 9, 1, 4])
    engine = EmbeddedEngine(
        lambda: CachedDecoder(policy, single_process, 120),
        stop_token_id=STOP,
        batch_size=batch_size,
    )
    requests = [GenerationRequest(prompt_ids=prompt, seed=0, max_new_tokens=20) for prompt in prompts]
    completions = generated(engine, requests, SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=20))
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, logprobs = [], []
        for _ in range(20):
            row = logits_of(reference, prompt + tuple(tokens))[-1].log_softmax(-1)
            tokens.append(int(row.argmax()))
            logprobs.append(row.max().item())
            if tokens[-1] == STOP:
                break
        assert list(completion.token_ids) == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=LOGPROB_ROUNDING)
        assert completion.finish_reason is (FinishReason.STOP if tokens[-1] == STOP else FinishReason.LENGTH)


def test_sampled_logprobs_are_the_policys_in_any_batch(pair, single_process):
    reference, policy = pair
    prompts = random_prompts([5, 2, 9, 1]) * 3
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=12)
    requests = [GenerationRequest(prompt_ids=p, seed=i, max_new_tokens=12) for i, p in enumerate(prompts)]
    results = []
    for batch_size in (12, 5, 1):
        engine = EmbeddedEngine(
            lambda: CachedDecoder(policy, single_process, 120),
            stop_token_id=STOP,
            batch_size=batch_size,
        )
        results.append(generated(engine, requests, sampling))
    for completion, *others in zip(*results, strict=True):
        for other in others:
            assert other.token_ids == completion.token_ids
            assert other.logprobs == pytest.approx(completion.logprobs, abs=LOGPROB_ROUNDING)
    for prompt, completion in zip(prompts[:4], results[0][:4], strict=True):
        rows = (logits_of(reference, prompt + completion.token_ids)[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=LOGPROB_ROUNDING)
    assert len({completion.token_ids for completion in results[0]}) > 4  # seeds differ, so samples do


def test_an_unsupported_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    with pytest.raises(ValueError, match="MambaForCausalLM is not supported; supported are Qwen2ForCausalLM"):
        geometry_of(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        geometry_of(tmp_path / "nowhere")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_name_the_prompt(single_process, tmp_path, temperature):
    policy = as_policy(save_tiny(tmp_path / "hf", "qwen2", tied=False), single_process)
    with torch.no_grad():
        policy.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = torch.nan
    engine = EmbeddedEngine(
        lambda: CachedDecoder(policy, single_process, 120),
        stop_token_id=STOP,
        batch_size=2,
        text_of=lambda ids: f"<{ids[0]}>",
    )
    requests = [GenerationRequest(prompt_ids=(n, 3), seed=0, max_new_tokens=4) for n in (5, 6)]
    with pytest.raises(FloatingPointError, match="not numbers at token 0 of the response to the prompt '<5>'"):
        generated(engine, requests, SamplingConfig(temperature=temperature, top_p=0.9, max_new_tokens=4))
