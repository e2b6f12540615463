"""The local layers' attention: rotary embeddings against Megatron-Core's, and rows whose responses share a prompt."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from oreal_megatron.data.packing import PackedSequence, Padding, pack
from oreal_megatron.models.packed_row import packed_row
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.reward_model import build_reward_model
from tests.tiny_models import GEOMETRY, LOGPROB_ROUNDING, MODEL

CPU = torch.device("cpu")
PROMPTS = {"a": tuple(range(30, 45)), "b": (7, 8, 9), "c": (11,)}
SEQUENCES = [
    PackedSequence(id=f"{name}{n}", prompt_ids=PROMPTS[name], response_ids=tuple(range(50 + n, 52 + 2 * n)))
    for n in range(9)
    for name in PROMPTS
]


def test_a_packed_row_is_rotated_as_megatron_rotates_it(single_process):
    policy = build_policy(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
    attention = policy.decoder.layers[0].self_attention
    batch = pack(SEQUENCES, CPU)
    seen = {}
    attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.update(rotated=inputs[:2]))
    rotated = attention.get_query_key_value_tensors

    def unrotated(*args, **options):
        seen["plain"] = super(type(attention), attention).get_query_key_value_tensors(*args, **options)[:2]
        return rotated(*args, **options)

    attention.get_query_key_value_tensors = unrotated
    score(policy, [batch], lambda output, _: None, single_process)
    angles = policy.rotary_pos_emb(batch.max_seqlen)
    for plain, found in zip(seen["plain"], seen["rotated"], strict=True):
        expected = apply_rotary_pos_emb(
            plain.squeeze(1), angles, policy.config, batch.cu_seqlens, cp_group=single_process.collection.cp
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", [Padding(), Padding(row=64)], ids=["plain", "padded"])
def test_a_shared_prompt_changes_no_value_and_no_gradient(single_process, padding):
    policy = build_policy(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)

    def found(shares_prompts):
        batch = pack(SEQUENCES, CPU, padding, shares_prompts=shares_prompts)
        policy.zero_grad()
        row = packed_row(batch, batch.positions[0])
        output = policy(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=row)
        logprobs = batch.split_by_sequence(output[batch.predicting, 0])
        weights = {id: 1.0 + n for n, id in enumerate(s.id for s in SEQUENCES)}
        sum(weights[id] * part.sum() for id, part in zip(batch.ids, logprobs, strict=True)).backward()
        gradients = [parameter.grad.clone() for parameter in policy.parameters()]
        return batch.tokens.size(1), dict(zip(batch.ids, logprobs, strict=True)), gradients

    (many, whole, gradients), (few, shared, shared_gradients) = found(False), found(True)
    assert few < many
    for id, logprobs in whole.items():
        torch.testing.assert_close(shared[id], logprobs, atol=LOGPROB_ROUNDING, rtol=0)
    for a, b in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


def test_scores_of_a_reward_model_are_those_of_whole_sequences(single_process):
    model = build_reward_model(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
    torch.nn.init.normal_(model.output_layer.weight)

    def found(shares_prompts):
        batch = pack(SEQUENCES, CPU, shares_prompts=shares_prompts)
        # The score after each response token is at the token's own position.
        (scores,) = score(model, [batch], lambda output, b: output[0, b.predicting + 1, 0].clone(), single_process)
        return dict(zip(batch.ids, batch.split_by_sequence(scores), strict=True))

    whole, shared = found(False), found(True)
    for id, scores in whole.items():
        torch.testing.assert_close(shared[id], scores, atol=1e-4, rtol=1e-4)
