"""Scores to token weights, alignment, and what an update reports."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from oreal_megatron.config import AdamWConfig, ConfigError, parse_config
from oreal_megatron.data.packing import PackedSequence, Padding, micro_batches, pack
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.mismatch import _smallest, rollout_mismatch
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.step import (
    UpdateRefused,
    _aligned,
    score_sequences,
    update_policy,
    update_reward_model,
    with_reference,
    with_token_weights,
)
from tests.tiny_models import GEOMETRY, MODEL

CPU = torch.device("cpu")
ADAMW = AdamWConfig(
    lr=1e-3, min_lr=1e-4, warmup_steps=2, decay_steps=10, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-4,
    clip_grad=1.0,
)  # fmt: skip


def trained(build, groups, adamw=ADAMW) -> TrainedModel:
    module = build(GEOMETRY, MODEL, groups, vocab_size=105, seed=0)
    return TrainedModel(module, adamw, groups, num_updates=10)


def sequences() -> list[PackedSequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        PackedSequence(
            id=str(i),
            prompt_ids=tuple(torch.randint(0, 105, (3,), generator=generator).tolist()),
            response_ids=tuple(torch.randint(0, 105, (2 + i,), generator=generator).tolist()),
            correct=i % 2 == 0,
            advantage=1.0 if i % 2 == 0 else -0.5,
            rollout_logprobs=(-1.0,) * (2 + i),
        )
        for i in range(7)
    ]


def test_alignment_reads_the_state_before_or_after_a_token():
    batch = pack([PackedSequence(id="a", prompt_ids=(1, 2), response_ids=(3, 4), rollout_logprobs=(0.0, 0.0))], CPU)
    output = torch.arange(4.0).view(1, 4, 1)  # the state after tokens 1, 2, 3, 4
    assert _aligned(output, batch, "predictor").tolist() == [1.0, 2.0]
    assert _aligned(output, batch, "inclusive").tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("preset", "depends"), [("oreal", True), ("oreal_paper", True), ("oreal_release", False)])
def test_weight_of_the_first_token_depends_on_it(composed, single_process, preset, depends):
    """Two responses that part at their first token: a weight that cannot depend on it cannot say which one erred."""
    config = parse_config(composed(f"objective={preset}")).objective
    reward_model = build_reward_model(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
    torch.nn.init.normal_(reward_model.output_layer.weight, generator=torch.Generator().manual_seed(1))
    parts = [
        PackedSequence(id=str(token), prompt_ids=(1, 2), response_ids=(token, 9), rollout_logprobs=(0.0, 0.0))
        for token in (3, 4)
    ]
    scored = score_sequences(
        reward_model, [pack([part], CPU) for part in parts], config.token_weights.alignment, single_process
    )
    first, second = (scores_R[0].item() for scores_R in scored.scores)
    assert (first != pytest.approx(second, abs=1e-6)) == depends


def test_ranking_within_prompts_has_the_same_gradient_for_every_split(composed, single_process):
    """Pairs of a prompt are in different micro-batches; the gradient is that of the loss on the whole step."""
    override = "objective.reward_model.ranking_weight=0.7"
    config = parse_config(composed("objective=oreal", override)).objective
    prompt_of = {str(i): str(i // 3) for i in range(7)}

    def gradients(split):
        model = trained(build_reward_model, single_process)
        torch.nn.init.normal_(model.module.output_layer.weight, generator=torch.Generator().manual_seed(1))
        _, metrics = update_reward_model(model, split, config, num_sequences=7, prompt_of=prompt_of)
        return metrics["loss/reward_model_ranking"], [p.main_grad.clone() for p in model.module.parameters()]

    def autograd():
        module = build_reward_model(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
        torch.nn.init.normal_(module.output_layer.weight, generator=torch.Generator().manual_seed(1))
        means = []
        for sequence in sequences():
            batch = pack([sequence], CPU)
            output = module(batch.tokens, batch.positions, None, labels=batch.labels)
            means.append(output[0, batch.predicting + 1, 0].mean())
        means, correct = torch.stack(means), torch.tensor([s.correct for s in sequences()])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(means, correct.float())
        gaps = torch.stack([means[0] - means[1], means[2] - means[1], means[4] - means[3], means[4] - means[5]])
        ranking = torch.nn.functional.softplus(-gaps).mean()
        (loss + 0.7 * ranking).backward()
        return ranking.item(), [p.grad for p in module.parameters()]

    expected, by_autograd = autograd()
    for num_batches in (1, 3, 7):
        found, split = gradients([pack(sequences()[index::num_batches], CPU) for index in range(num_batches)])
        assert found == pytest.approx(expected, rel=1e-5)
        scale = min(1.0, ADAMW.clip_grad / sum(g.square().sum() for g in by_autograd).sqrt())
        for a, b in zip(split, by_autograd, strict=True):
            torch.testing.assert_close(a, b * scale, atol=1e-6, rtol=1e-4)


def first_of_correct(scores_T, *, correct, config, prompt_ids, response_ids):
    """A user's function: weight 2 for the first token of a correct response, if its ids are what the batch holds."""
    assert (prompt_ids < 105).all() and len(prompt_ids) == 3 and len(response_ids) == len(scores_T)
    return torch.nn.functional.one_hot(torch.tensor(0), len(scores_T)).float() * (2.0 * correct)


def test_a_function_of_ones_own_weighs_the_tokens(composed, single_process):
    weights = f"objective.functions.token_weights={__name__}"
    config = parse_config(composed(f"{weights}.first_of_correct")).objective
    made = [sequence for sequence in sequences() if len(sequence.response_ids) < 6]
    (batch,) = with_token_weights([pack(made, CPU)], None, config, single_process)
    for index, (sequence, part) in enumerate(zip(made, batch.split_by_sequence(batch.token_weights), strict=True)):
        prompt_ids, response_ids = batch.ids_of(index)
        assert tuple(prompt_ids.tolist()) == sequence.prompt_ids
        assert tuple(response_ids.tolist()) == sequence.response_ids
        assert part.tolist() == [2.0 * sequence.correct] + [0.0] * (len(part) - 1)
    for path, problem in (
        ("nowhere.weights", r"functions.token_weights = 'nowhere.weights': It cannot be imported"),
        (f"{__name__}.__name__", r"It is a str\. Set it to module.name of a function"),
    ):
        config = parse_config(composed(f"objective.functions.token_weights={path}")).objective
        with pytest.raises(ConfigError, match=problem):
            with_token_weights([batch], None, config, single_process)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (lambda scores: scores[:-1], r"first_of_correct of 0 returned .* shape \[1\] .*; return a float32 .* \[2\]"),
        (lambda scores: scores.double(), r"returned torch.float64 of shape \[2\]"),
        (lambda scores: scores.numpy(), "returned a ndarray; return a float32 tensor"),
        (lambda scores: scores - 1, "returned a weight of -1.0; return finite numbers of at least 0"),
        (lambda scores: scores / 0, "returned a weight of nan"),
        (lambda scores: {}["key"], r"first_of_correct raised KeyError: 'key'"),
    ],
)
def test_what_is_no_weight_is_refused(composed, single_process, monkeypatch, returned, problem):
    monkeypatch.setitem(globals(), "first_of_correct", lambda scores_T, **_: returned(scores_T))
    config = parse_config(composed(f"objective.functions.token_weights={__name__}.first_of_correct")).objective
    with pytest.raises(ValueError, match=problem):
        with_token_weights([pack(sequences(), CPU)], None, config, single_process)


@pytest.mark.parametrize("padding", [Padding(), Padding(sequence=16, row=16)], ids=["packed", "padded"])
@pytest.mark.parametrize("num_batches", [1, 2, 7])
def test_splitting_into_micro_batches_changes_no_update(composed, single_process, num_batches, padding):
    config = parse_config(composed("objective=oreal", "objective.beta=0.1")).objective

    def updated(split):
        policy, reward_model = trained(build_policy, single_process), trained(build_reward_model, single_process)
        torch.nn.init.normal_(reward_model.module.output_layer.weight, generator=torch.Generator().manual_seed(1))
        batches = with_reference(trained(build_policy, single_process).module, split, single_process)
        scored, metrics = update_reward_model(reward_model, batches, config, num_sequences=7)
        batches = with_token_weights(batches, scored, config, single_process)
        counts = TokenCounts(correct=2 + 4 + 6 + 8, incorrect=3 + 5 + 7, limit=0)
        metrics |= update_policy(policy, batches, config, counts)
        weights = [p.detach() for model in (policy, reward_model) for p in model.module.parameters()]
        return metrics, weights

    whole = updated([pack(sequences(), CPU)])
    split = updated([pack(sequences()[index::num_batches], CPU, padding) for index in range(num_batches)])
    assert split[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    assert whole[0]["policy/token_weight"] > 0.01
    for a, b in zip(split[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_schedule_warms_up_then_decays(single_process):
    model = trained(build_policy, single_process)
    rates = []
    for _ in range(10):
        model.advance_schedule()
        rates.append(model.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(5e-4) and rates[1] == pytest.approx(1e-3)
    cosine = 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * 4 / 8))
    assert rates[5] == pytest.approx(cosine) and rates[9] == pytest.approx(1e-4)


def test_every_update_sees_its_own_gradient_alone(composed, single_process):
    config = parse_config(composed("objective=oreal_no_rm")).objective
    still = ADAMW.model_copy(update={"lr": 1e-30, "min_lr": 0.0})  # weights stay as they are
    policy = trained(build_policy, single_process, still)
    batches = with_token_weights(micro_batches(sequences(), 24, CPU), None, config, single_process)
    batches = with_reference(policy.module, batches, single_process)
    counts = TokenCounts(correct=20, incorrect=15, limit=0)
    norms = [update_policy(policy, batches, config, counts)["policy/grad_norm"] for _ in range(3)]
    assert len(batches) > 1 and norms == pytest.approx([norms[0]] * 3, rel=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing(composed, single_process):
    config = parse_config(composed("objective=oreal_no_rm")).objective
    policy = trained(build_policy, single_process)
    before = [p.detach().clone() for p in policy.module.parameters()]
    batches = with_token_weights(micro_batches(sequences(), 1000, CPU), None, config, single_process)
    batches = with_reference(policy.module, batches, single_process)
    batches[0].advantages[0] = math.nan
    with pytest.raises(UpdateRefused, match=r"positive = nan in a micro-batch of .*6.*0"):
        update_policy(policy, batches, config, TokenCounts(correct=20, incorrect=15, limit=0))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))


def test_percentile_is_exact_among_many_equal_and_tiny_values(single_process):
    values = torch.cat([torch.randn(5000), torch.full((3000,), 0.25), torch.randn(500) * 1e-30, torch.zeros(100)])
    parts = list(values.split(1000))
    for k in (1, 90, 101, 700, 4000, len(values)):
        assert _smallest(parts, k, single_process) == values.abs().kthvalue(k).values.item()


def test_mismatch_of_known_differences(single_process):
    """Two micro-batches, 200 tokens: 196 exact, two off by ln 2 and two by -ln 2."""
    ln2 = math.log(2.0)
    differences = [torch.tensor([0.0] * 96 + [ln2, -ln2]), torch.tensor([ln2, -ln2] + [0.0] * 100)]
    found = rollout_mismatch(differences, single_process)
    weights = [1.0] * 196 + [2.0, 0.5] * 2
    assert found == pytest.approx(
        {
            "rollout_logprob_difference": 4 * ln2 / 200,
            "rollout_logprob_difference_p99": ln2,
            "rollout_logprob_difference_max": ln2,
            "rollout_kl_k3": 2 * ((2 - 1 - ln2) + (0.5 - 1 + ln2)) / 200,
            "rollout_effective_samples": sum(weights) ** 2 / (200 * sum(w * w for w in weights)),
        }
    )


def test_rollouts_of_another_model_are_not_trained_on(composed, single_process):
    config = parse_config(composed("objective=oreal_no_rm")).objective
    policy = trained(build_policy, single_process)
    before = [p.detach().clone() for p in policy.module.parameters()]
    batches = with_token_weights(micro_batches(sequences(), 1000, CPU), None, config, single_process)
    batches = with_reference(policy.module, batches, single_process)
    with pytest.raises(UpdateRefused, match=r"more than rollout.mismatch.stop = 0.5 \(99th percentile"):
        update_policy(policy, batches, config, TokenCounts(correct=20, incorrect=15, limit=0), max_mismatch=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))


def test_older_tokens_are_no_mismatch_and_get_importance_weights(composed, single_process):
    """The first two of four tokens are older, drawn with a quarter and with twice of today's probability."""
    config = parse_config(composed("objective=oreal_no_rm", "objective.importance_limit=2.0")).objective
    sequence = PackedSequence(id="a", prompt_ids=(1, 2), response_ids=(3, 4, 5, 6), advantage=1.0)
    own = with_reference(trained(build_policy, single_process).module, [pack([sequence], CPU)], single_process)[0]
    drawn = own.reference_logprobs - torch.tensor([4.0, 0.5, 1.0, 1.0]).log()

    def update(num_older_tokens):
        carried = replace(sequence, rollout_logprobs=tuple(drawn.tolist()), num_older_tokens=num_older_tokens)
        batch = replace(pack([carried], CPU), reference_logprobs=own.reference_logprobs)
        batches = with_token_weights([batch], None, config, single_process)
        counts = TokenCounts(correct=4, incorrect=0, limit=0)
        return update_policy(trained(build_policy, single_process), batches, config, counts, max_mismatch=0.01)

    metrics = update(2)
    assert metrics["policy/rollout_logprob_difference_max"] < 1e-5
    assert metrics["policy/importance_weight"] == pytest.approx((2.0 + 0.5 + 1.0 + 1.0) / 4)
    assert metrics["policy/importance_truncated"] == 0.25
    with pytest.raises(UpdateRefused):
        update(0)


def test_corrections_are_counted_by_token_and_response(composed, single_process):
    """Ratios 4 and 1/2 in one response, 1 and 8 in another: the second's geometric mean is beyond the band."""
    bands = ("objective.importance_token_band=[0.25,2.0]", "objective.importance_response_band=[0.5,2.0]")
    config = parse_config(composed("objective=oreal_no_rm", "objective.importance_limit=3.0", *bands)).objective
    sequences = [PackedSequence(id=id, prompt_ids=(1, 2), response_ids=(3, 4), advantage=1.0) for id in "ab"]
    own = with_reference(trained(build_policy, single_process).module, [pack(sequences, CPU)], single_process)[0]
    drawn = (own.reference_logprobs - torch.tensor([4.0, 0.5, 1.0, 8.0]).log()).tolist()
    carried = [
        replace(sequences[0], rollout_logprobs=tuple(drawn[:2]), num_older_tokens=2),
        replace(sequences[1], rollout_logprobs=tuple(drawn[2:]), num_older_tokens=1),
    ]
    batches = [
        replace(pack([one], CPU), reference_logprobs=own.reference_logprobs[2 * i : 2 * i + 2])
        for i, one in enumerate(carried)
    ]
    batches = with_token_weights(batches, None, config, single_process)
    counts = TokenCounts(correct=4, incorrect=0, limit=0)
    metrics = update_policy(trained(build_policy, single_process), batches, config, counts)
    assert metrics["policy/importance_dropped_tokens"] == 0.75
    assert metrics["policy/importance_dropped_responses"] == 0.5
    assert metrics["policy/importance_weight"] == pytest.approx((3.0 + 0.5 + 1.0 + 3.0) / 4)
    assert metrics["policy/importance_truncated"] == 0.5
    assert metrics["policy/importance_effective_samples"] == pytest.approx(0.5**2 / (4 * 0.5**2))
    older = [math.log(4.0), math.log(2.0), 0.0]
    assert metrics["policy/older_logprob_difference"] == pytest.approx(sum(older) / 3, abs=1e-5)
    assert metrics["policy/older_logprob_difference_max"] == pytest.approx(math.log(4.0), abs=1e-5)


def bytes_on_device(tensors):
    """Bytes of the storages of tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def moments(model):
    """AdamW's two moments of every parameter."""
    parts = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


def test_offloaded_model_holds_no_memory_and_trains_the_same(composed, single_process):
    config = parse_config(composed("objective=oreal_no_rm")).objective
    layout = single_process.layout.model_copy(update={"offload": True})
    moving, staying = (
        trained(build_policy, replace(single_process, layout=layout)),
        trained(build_policy, single_process),
    )
    for policy in (moving, staying):
        for _ in range(2):
            policy.offload()
            with policy.on_device():
                batches = with_token_weights(micro_batches(sequences(), 24, CPU), None, config, single_process)
                batches = with_reference(policy.module, batches, single_process)
                update_policy(policy, batches, config, TokenCounts(correct=20, incorrect=15, limit=0))
    assert bytes_on_device(moving.module.parameters()) == bytes_on_device(moments(moving)) == 0
    assert all(chunk.buffers[0].grad_data.untyped_storage().nbytes() == 0 for chunk in moving.chunks)
    assert bytes_on_device(staying.module.parameters()) > 10_000 and bytes_on_device(moments(staying)) > 20_000
    with moving.on_device(states=True):
        assert bytes_on_device(moving.module.parameters()) == bytes_on_device(staying.module.parameters())
        for a, b in zip(moving.module.parameters(), staying.module.parameters(), strict=True):
            assert torch.equal(a, b)
