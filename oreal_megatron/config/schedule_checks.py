"""Checks of the order of generation, training and evaluation across sections."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.config.errors import Violation
from oreal_megatron.config.rollout import RolloutConfig
from oreal_megatron.config.sections import EvaluationConfig, Fp8Config, RunConfig
from oreal_megatron.config.sft_checks import CHECKS, check

__all__ = ["CHECKS", "check"]


@check("rollout")
def _check_staleness(rollout: RolloutConfig) -> Iterator[Violation]:
    schedule, bound = rollout.schedule, rollout.staleness_bound
    if schedule == "in_turn" and bound:
        remedy = "In turn, no rollout is generated ahead. Set it to null, or rollout.schedule=continuous."
        yield Violation("rollout.max_staleness", bound, remedy)
    if schedule == "one_ahead" and bound != 1:
        remedy = "Rollouts of the step before train with one update between. Set it to null"
        remedy += ", or rollout.schedule=continuous." if bound else "."
        yield Violation("rollout.max_staleness", bound, remedy)
    if schedule == "continuous" and not bound:
        remedy = "Responses that go on under new weights are older than the policy. Set it to null, or 1 or more."
        yield Violation("rollout.max_staleness", bound, remedy)


@check("rollout")
def _check_in_flight(rollout: RolloutConfig) -> Iterator[Violation]:
    if rollout.in_flight == "keep_cache" and rollout.schedule != "continuous":
        remedy = f"With rollout.schedule={rollout.schedule}, no response is under way at a publication. Set it to "
        yield Violation("rollout.in_flight", "keep_cache", f"{remedy}recompute, or rollout.schedule=continuous.")


@check("rollout")
def _check_ahead(rollout: RolloutConfig) -> Iterator[Violation]:
    schedule = rollout.schedule
    if schedule == "in_turn":
        return
    if rollout.backend == "embedded":
        remedy = "The trainer's own model cannot generate while it trains. Set rollout.schedule=in_turn, or "
        yield Violation("rollout.schedule", schedule, f"{remedy}rollout=sglang.")
    if rollout.sglang is not None and rollout.sglang.shares_devices:
        remedy = "Colocated servers stand still while the trainer works. Set rollout.schedule=in_turn, or "
        remedy += "rollout=sglang_disaggregated."
        yield Violation("rollout.schedule", schedule, remedy)
    if rollout.long_tail is not None:
        remedy = "A step has its groups from earlier generation and stops none early. Set rollout.long_tail=null, or "
        yield Violation("rollout.schedule", schedule, f"{remedy}rollout.schedule=in_turn.")
    if rollout.generation is not None:
        remedy = "A function's responses of several turns are generated in turn. Set rollout.generation=null, or "
        yield Violation("rollout.schedule", schedule, f"{remedy}rollout.schedule=in_turn.")


@check("evaluation", "fp8")
def _check_evaluated_weights(evaluation: EvaluationConfig, fp8: Fp8Config) -> Iterator[Violation]:
    if evaluation.servers and fp8.policy is not None and fp8.policy.parameters:
        remedy = (
            "Weights of a step's checkpoint take the policy's place, which cannot get its FP8 weights back to the bit. "
            "Set it to 0, or fp8.policy.parameters=false."
        )
        yield Violation("evaluation.servers", evaluation.servers, remedy)


@check("evaluation", "rollout", "run")
def _check_evaluation_servers(
    evaluation: EvaluationConfig, rollout: RolloutConfig, run: RunConfig
) -> Iterator[Violation]:
    number, servers = evaluation.servers, rollout.sglang
    if not number:
        return
    if run.mode != "train":
        remedy = f"run.mode={run.mode} does not train on rollouts of its own. Set it to 0."
        yield Violation("evaluation.servers", number, remedy)
    if rollout.backend == "embedded" or servers is None:
        remedy = "The trainer's own model cannot generate while it trains. Set it to 0, or rollout=sglang."
        yield Violation("evaluation.servers", number, remedy)
        return
    if servers.shares_devices:
        remedy = "Colocated servers stand still while the trainer works. Set it to 0, or rollout=sglang_disaggregated."
        yield Violation("evaluation.servers", number, remedy)
    if number >= servers.total_servers:
        key = "urls" if servers.urls else "num_servers"
        remedy = f"rollout.sglang.{key} has {servers.total_servers}, and training needs at least one of them. "
        remedy += f"Set it to at most {servers.total_servers - 1}, or rollout.sglang.{key} to more servers."
        yield Violation("evaluation.servers", number, remedy)
    if not evaluation.benchmarks:
        remedy = "There is no benchmark, so these servers would do nothing. Set it to 0, or name benchmarks."
        yield Violation("evaluation.servers", number, remedy)
    if rollout.generation is not None:
        remedy = "A function's responses of several turns are generated in turn with training. Set it to 0, or "
        yield Violation("evaluation.servers", number, f"{remedy}rollout.generation=null.")


@check("rollout", "run")
def _check_mode(rollout: RolloutConfig, run: RunConfig) -> Iterator[Violation]:
    if rollout.schedule != "in_turn" and run.mode != "train":
        remedy = f"run.mode={run.mode} does not train on rollouts of its own. Set rollout.schedule=in_turn."
        yield Violation("rollout.schedule", rollout.schedule, remedy)
