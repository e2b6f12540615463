"""Log-probabilities by tiles and their gradients against the plain computation; the reward model's head."""

from __future__ import annotations

import pytest
import torch

from oreal_megatron.data.packing import PackedSequence, pack
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.policy import build_policy, token_logprobs
from oreal_megatron.models.reward_model import build_reward_model
from tests.tiny_models import GEOMETRY, MODEL

CPU = torch.device("cpu")


@pytest.mark.parametrize(("chunk", "size"), [(1, None), (4, 4), (4, 28), (100, None), (100, 77), (4, 1)])
def test_logprobs_by_tiles_and_their_gradients_equal_the_plain_ones(single_process, chunk, size):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 8, generator=generator), torch.randn(30, 8, generator=generator)
    target, upstream = torch.randint(0, 30, (11,), generator=generator), torch.randn(11, generator=generator)
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    logprobs, entropy = token_logprobs(*mine, target, 0, chunk=chunk, size=size, group=single_process.collection.tp)
    (logprobs * upstream).sum().backward()
    rows = (plain[0] @ plain[1].t()).log_softmax(-1)
    expected = rows.gather(1, target[:, None])[:, 0]
    (expected * upstream).sum().backward()

    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(rows.exp() * rows).sum(-1))
    assert not entropy.requires_grad
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero_lose_nothing(single_process, offset):
    hidden, weight = torch.tensor([[1.0, offset]]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    logprobs, entropy = token_logprobs(
        hidden, weight, torch.tensor([1]), 0, chunk=1, size=1, group=single_process.collection.tp
    )
    expected = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected[1:2], atol=2e-3, rtol=0)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum()[None], atol=2e-3, rtol=0)


def test_no_labelled_position_gives_an_empty_result_and_a_zero_gradient(single_process):
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    logprobs, _ = token_logprobs(hidden, weight, none, 0, chunk=4, group=single_process.collection.tp)
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and weight.grad.abs().sum() == 0


def test_a_fresh_reward_model_scores_zero_everywhere_and_can_learn(single_process):
    model = build_reward_model(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
    batch = pack([PackedSequence(id="a", prompt_ids=(1, 2, 3), response_ids=(4, 5))], CPU)
    (scores,) = score(model, [batch], lambda output, _: output.clone(), single_process)
    assert scores.shape == (1, 5, 1) and scores.dtype == torch.float32 and scores.abs().sum() == 0
    assert [name for name, _ in model.named_parameters() if "output_layer" in name] == [
        "output_layer.weight",
        "output_layer.bias",
    ]


def test_a_score_sees_no_later_token_and_no_other_sequence(single_process):
    model = build_reward_model(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
    torch.nn.init.normal_(model.output_layer.weight)

    def scores_of(*sequences):
        packed = [PackedSequence(id=str(i), prompt_ids=s[:1], response_ids=s[1:]) for i, s in enumerate(sequences)]
        (scores,) = score(model, [pack(packed, CPU)], lambda output, _: output[0, :, 0].clone(), single_process)
        return scores

    alone = scores_of((5, 6, 7, 8))
    torch.testing.assert_close(scores_of((5, 6, 7, 99))[:3], alone[:3])
    assert not torch.equal(scores_of((5, 6, 7, 99))[3:], alone[3:])
    torch.testing.assert_close(scores_of((1, 2, 3), (5, 6, 7, 8), (9, 9))[3:7], alone)


def test_weights_depend_on_the_seed_alone(single_process):
    def weights(seed):
        torch.manual_seed(torch.seed())
        model = build_reward_model(GEOMETRY, MODEL, single_process, vocab_size=105, seed=seed)
        return model.embedding.word_embeddings.weight.detach()

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_weights_from_scratch_are_drawn_by_name(single_process):
    def policy(layers: int) -> dict[str, torch.Tensor]:
        geometry = GEOMETRY.model_copy(update={"num_layers": layers})
        model = build_policy(geometry, MODEL, single_process, vocab_size=105, seed=0)
        return dict(model.named_parameters())

    two, four = policy(2), policy(4)
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        assert torch.equal(two[name], four[name])
    assert abs(two["decoder.layers.0.mlp.linear_fc1.weight"].std() - 0.02) < 1e-3
    assert abs(two["decoder.layers.0.mlp.linear_fc2.weight"].std() - 0.02 / 2) < 1e-3
    assert two["decoder.final_layernorm.weight"].eq(1).all()
    assert two["decoder.layers.0.self_attention.linear_qkv.bias"].eq(0).all()
