"""The update of supervised fine-tuning: its loss is that of the trained tokens, however they are packed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from oreal_megatron.config import AdamWConfig, SftConfig
from oreal_megatron.data.packing import PackedSequence, Packer, pack
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.supervised import heldout_metrics, update_supervised
from tests.parity.oreal_step import GEOMETRY, MODEL, VOCABULARY, conversations, sequences

ADAMW = AdamWConfig(
    lr=1e-2, min_lr=0.0, warmup_steps=2, decay_steps=12, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-4, clip_grad=1.0
)


def model(groups, adamw=ADAMW) -> TrainedModel:
    module = build_policy(GEOMETRY, MODEL, groups, vocab_size=VOCABULARY, seed=0)
    return TrainedModel(module, adamw, groups, num_updates=10)


def packer(groups, tokens: int) -> Packer:
    return replace(Packer.of_layout(groups, GEOMETRY, VOCABULARY), token_budget=tokens)


def test_loss_is_the_mean_over_trained_tokens_alone(single_process):
    trained, chosen = model(single_process), conversations(sequences(5))
    expected = []
    for one in chosen:
        batch = pack([replace(one, loss_mask=None)], torch.device("cpu"))
        (logprobs,) = score(trained.module, [batch], lambda out, b: out[b.predicting, 0].numpy().copy(), single_process)
        expected += logprobs[one.loss_mask].tolist()
    before = heldout_metrics(trained.module, chosen, packer(single_process, 48), single_process)
    metrics = update_supervised(trained, chosen, packer(single_process, 48))
    assert metrics["loss/nll"] == pytest.approx(-np.mean(expected), abs=1e-6)
    assert before["sft/heldout_loss"] == pytest.approx(-np.mean(expected), abs=1e-6)
    assert metrics["sft/trained_tokens"] == before["sft/heldout_tokens"] == len(expected)
    assert metrics["sft/tokens"] == sum(one.num_tokens for one in chosen) > len(expected)
    after = heldout_metrics(trained.module, chosen, packer(single_process, 48), single_process)
    assert after["sft/heldout_loss"] < before["sft/heldout_loss"] - 0.01


def test_packed_equals_unpacked(single_process):
    found = {}
    for tokens in (1, 48, 10_000):
        trained = model(single_process)
        metrics = [
            update_supervised(trained, conversations(sequences(6)), packer(single_process, tokens)) for _ in range(3)
        ]
        weights = torch.cat([p.detach().flatten() for p in trained.module.parameters()])
        found[tokens] = [m["loss/nll"] for m in metrics], weights
    losses, weights = found[1]
    for packed_losses, packed_weights in (found[48], found[10_000]):
        assert packed_losses == pytest.approx(losses, rel=1e-6)
        # Adam multiplies the gradients' rounding by up to lr / eps = 100 in each of the three steps of 1e-2.
        torch.testing.assert_close(packed_weights, weights, rtol=0, atol=1e-5)
    assert losses[2] < losses[0] - 0.01


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", [0.005, 0.01, 0.01 * (1 + np.cos(np.pi * 0.1)) / 2, 0.01 * (1 + np.cos(np.pi * 0.2)) / 2]),
        ("linear", [0.005, 0.01, 0.009, 0.008]),
        ("constant", [0.005, 0.01, 0.01, 0.01]),
    ],
)
def test_learning_rate_rises_and_decays_as_asked(single_process, decay, expected):
    trained = model(single_process, ADAMW.model_copy(update={"decay": decay}))
    one = [PackedSequence(id="a", prompt_ids=(1,), response_ids=(2, 3))]
    rates = [update_supervised(trained, one, packer(single_process, 48))["policy/lr"] for _ in range(4)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_gradient_that_is_no_number_refuses_the_update(single_process):
    trained = model(single_process)
    before = [p.detach().clone() for p in trained.module.parameters()]
    before[0][:] = torch.nan
    next(iter(trained.module.parameters())).data[:] = torch.nan
    with pytest.raises(FloatingPointError, match="gradient norm is nan, at a loss of nan"):
        update_supervised(trained, sequences(2), packer(single_process, 48))
    assert all(torch.equal(p, b) for p, b in zip(list(trained.module.parameters())[1:], before[1:], strict=True))


def test_sections_of_fine_tuning_name_the_files_that_they_read():
    config = SftConfig(
        steps=1, batch_size=1, demonstrations=None, optimizer=ADAMW,
        sources={"a": {"path": "a.jsonl"}, "b": {"path": "b", "weight": 0.5}}, heldout={"path": "h"},
    )  # fmt: skip
    assert config.paths == {"sft.heldout.path": "h", "sft.sources.a.path": "a.jsonl", "sft.sources.b.path": "b"}
