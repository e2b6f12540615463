"""The section `objective`: which responses train, with what advantage, token weights and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oreal_megatron.config.fields import (
    FloatPair,
    Function,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Text,
)


class TokenWeightConfig(Section):
    """Token weights from the reward model's scores: eq. (10) and its variants."""

    source: Literal["reward_model", "ones"]
    """Source of token weights. reward_model: its scores; ones: every token has weight 1, and there is no reward
    model."""
    form: Literal["confidence", "change", "departure"]
    """Quantity that weighs a token, in the direction of the outcome. confidence: eq. (10). change: by how much the
    token moves the confidence c, c_t - c_(t-1) with c_0 = 1/2. departure: by how much the token's score departs from
    the mean score before it. The latter two are not the paper's; where they are negative, the weight is 0."""
    normalize: Literal["none", "mean"]
    """Scale of the weights. none: as they are; mean: divided by their mean over the response, so that every response
    with a weight has the mean weight 1. Not the paper's."""
    floor: Annotated[float, Field(ge=0.0, le=1.0)]
    """Weight that every token keeps: the weight w becomes floor + (1 - floor) w. Above 0 it is not the paper's."""
    alignment: Literal["predictor", "inclusive"]
    """Position whose score weighs token t. predictor: the position that predicts t; inclusive: t's own."""
    positive_threshold: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Confidence c up to which a token of a correct response has weight 0, with c the sigmoid of the mean score of the
    tokens so far; under `form: confidence`."""
    negative_threshold: Annotated[float, Field(ge=0.0, lt=1.0)]
    """The same threshold on 1 - c, for incorrect responses."""
    top_share: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Share of each response's tokens that keep a weight, those of highest confidence, min-max rescaled; under
    `form: confidence`. null: the thresholds decide."""


class FunctionsConfig(Section):
    """Functions of one's own in place of parts of the objective. docs/extending.md has their arguments."""

    advantages: Function | None
    """Advantages of a group's responses, in place of `shaping`. null: none, as for the others."""
    keep_group: Function | None
    """Whether a group trains, in place of `keep_groups`."""
    choose: Function | None
    """Responses of a kept group that train, in place of `selection`."""
    token_weights: Function | None
    """Weights of a response's tokens, in place of eq. (10)."""
    policy_loss: Function | None
    """Losses of the tokens, in place of `positive_term` and `negative_term`."""
    kl: Function | None
    """Estimates of the KL divergence by token, in place of `kl_type`."""


class RewardModelUpdateConfig(Section):
    """Updates of the reward model in a step. Other values than those of `oreal` are not the paper's."""

    responses: Literal["trained", "all"]
    """Responses that it learns from. trained: those that the policy trains on; all: every decided response."""
    updates: Positive
    """Number of its updates, each on all of these responses. Its learning rate schedule counts each."""
    ranking_weight: NonNegativeFloat
    """Weight of a second loss term: -log sigmoid(a - b), with a and b the mean scores of a correct and an incorrect
    response to the same prompt, averaged over all such pairs of the step. 0: eq. (12) alone."""


class UpdatesConfig(Section):
    """Updates of the policy in a step: epochs times mini-batches. Other values than 1 are not the paper's."""

    epochs: Positive
    """Number of passes over the step's responses."""
    minibatches: Positive
    """Number of parts that the responses are split into, with an update on each. Parts are of whole responses, drawn
    once a step from run.seed and step, and the same in every epoch. A step with fewer responses has fewer parts."""

    @property
    def number(self) -> int:
        return self.epochs * self.minibatches


class ObjectiveConfig(Section):
    """The objective of a step. conf/objective has presets."""

    preset: Text
    """Name of the objective in logs and reports."""
    reward_values: FloatPair
    """Rewards of an incorrect and of a correct response."""
    shaping: Literal["rloo", "grpo", "paper", "raw", "positive_one", "negative_one"]
    """Advantage of a response. rloo: reward minus the mean reward of the group's other responses; grpo: reward minus
    the group's mean, divided by its standard deviation; paper: 1 for correct and -(1 - pass rate) for incorrect
    responses; raw: the reward; positive_one, negative_one: 1 or -1 for all."""
    grpo_epsilon: NonNegativeFloat
    """Number added to the standard deviation under `shaping: grpo`."""
    keep_groups: Literal["mixed", "all", "any_correct", "any_incorrect"]
    """Groups that train. mixed: with correct and incorrect responses; any_correct, any_incorrect: with at least one."""
    selection: Literal["pair", "all", "correct", "incorrect"]
    """Responses of a kept group that train. pair: one correct and one incorrect response, drawn at random."""
    token_weights: TokenWeightConfig
    """Weights of the tokens in the policy terms."""
    functions: FunctionsConfig
    """Functions of one's own in place of parts of the objective."""
    reward_model: RewardModelUpdateConfig
    """Updates of the reward model."""
    updates: UpdatesConfig
    """Updates of the policy."""
    positive_term: Literal["logprob", "ratio"]
    """Loss of a correct response's token, A the response's advantage. logprob: -A * weight * log pi; ratio:
    -A * weight * ratio (see ratio_reference)."""
    negative_term: Literal["logprob", "ratio"]
    """Loss of an incorrect response's token, likewise."""
    ratio_reference: Literal["self", "rollout"]
    """Denominator of a ratio. self: the policy before the step's first update. With one update a step that is the
    policy itself, so the value is 1 and the gradient that of log pi; rollout: the log-probabilities that the response
    was drawn with."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] | None
    """PPO clip range of the ratio. Needs `ratio_reference: rollout`, or several updates a step. null: no clipping."""
    importance_limit: PositiveFloat | None
    """Upper limit of token-level importance weights pi / pi_rollout in the policy terms, with pi before the
    step's first update. Needs `ratio_reference: self`. null: no importance weights."""
    importance_token_band: FloatPair | None = None
    """Smallest and largest ratio pi / pi_rollout of a token that has policy terms, with pi before the step's
    first update; other tokens have the KL term alone. null: all tokens have them."""
    importance_response_band: FloatPair | None = None
    """The same for a whole response, by the geometric mean of its tokens' ratios."""
    normalize_advantages: Literal["none", "step"]
    """Scale of the advantages. none: as `shaping` gives them; step: those of all trained responses of the step, less
    their mean and divided by their standard deviation."""
    denominators: Literal["by_outcome", "all_trained", "token_limit"]
    """Token count that a policy term is divided by. by_outcome: trained tokens of the same outcome (eq. 11);
    all_trained: all trained tokens; token_limit:
    rollout.sampling.max_new_tokens for each trained response, so that a token counts the same in every response."""
    eta: NonNegativeFloat
    """Weight of the negative term."""
    kl_type: Literal["k3", "k1", "mse"]
    """Estimator of KL(policy || reference), from d = log pi - log pi_reference. k3: exp(-d) + d - 1; k1: d, whose
    gradient does not depend on the reference on average; mse: d^2 / 2."""
    beta: NonNegativeFloat
    """Weight of the KL term. 0: no KL term."""
    kl_on_correct: bool
    """Apply the KL term to correct responses too. false: to incorrect responses only."""
    actor_freeze_steps: NonNegative
    """Number of steps with a usable group, from the start, in which only the reward model trains. Without a reward
    model nothing trains in them, which gives runs to compare with the same updates."""
    undecided_as_incorrect: bool
    """Treat responses that the verifier leaves UNDECIDED as incorrect. false: leave them out of their group."""
    pair_choice: Literal["seeded", "global_rng"]
    """Random generator of `selection: pair`. seeded: from run.seed, step and prompt; global_rng: one generator for the
    run, as in the authors' release."""
    sampler: Literal["exact", "release"]
    """Use of the selected responses. exact: each trains once; release: counts are rounded up and some train twice, as
    in the authors' release (docs/algorithm.md)."""
    policy_schedule: Literal["from_first_update", "from_first_step"]
    """Start of the policy's learning rate schedule. from_first_step also counts the steps in which the policy is
    frozen."""
    optimizer: Literal["standard", "release"]
    """Details of both optimizers. standard: the cosine starts at the end of the warm-up, and biases and norms do not
    decay; release: the cosine starts one update later, and everything decays, as in the authors' release."""
    train_head_bias: bool
    """Train the bias of the reward model's scalar head. false: it stays at its initial 0, since the head of the
    authors' release has none."""

    @property
    def uses_reward_model(self) -> bool:
        return self.token_weights.source == "reward_model"
