"""Checks of SGLang's speculative decoding, whose tokens and log-probabilities must be those of the target model."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.config.errors import Violation
from oreal_megatron.config.rollout import VERIFICATION_OPTIONS, RolloutConfig, SGLangConfig
from oreal_megatron.config.schedule_checks import CHECKS, check

__all__ = ["CHECKS"]

_ALGORITHMS = ("EAGLE", "EAGLE3", "NEXTN")
_UNVERIFIED = (
    "speculative-accept-threshold-single",
    "speculative-accept-threshold-acc",
    "speculative-use-block-verification",
    "enable-multi-layer-eagle",
)
"""Options whose other values change the distribution, or are not known to keep it."""


@check("rollout")
def _check_speculation(rollout: RolloutConfig) -> Iterator[Violation]:
    servers = rollout.sglang
    if servers is None or not any(name.startswith("speculative-") for name in servers.options):
        return
    algorithm = servers.options.get("speculative-algorithm")
    if algorithm not in _ALGORITHMS:
        remedy = (
            "SGLang's log-probabilities and tokens are known to be the model's under rejection sampling, which has "
        )
        remedy += f"{', '.join(_ALGORITHMS)} alone. Set it to one of them, or remove all speculative options."
        yield _violation(servers, "speculative-algorithm", remedy)
        return
    if servers.device == "cpu":
        remedy = (
            "On a CPU, SGLang takes the most probable token at any temperature when it verifies a draft. Remove all "
        )
        yield _violation(servers, "speculative-algorithm", f"{remedy}speculative options, or set device=cuda.")
    if servers.shares_devices:
        remedy = (
            "Memory that a server releases is undefined, and nothing sends a draft model's weights again. Remove all "
        )
        remedy += "speculative options, or set rollout=sglang_disaggregated."
        yield _violation(servers, "speculative-algorithm", remedy)
    if servers.transport == "disk":
        remedy = "SGLang loads such a directory into the draft model too. Set rollout.sglang.transport=direct."
        yield Violation("rollout.sglang.transport", servers.transport, remedy)
    if servers.options.get("speculative-use-rejection-sampling") is not True:
        remedy = "Only rejection sampling is known to draw from the model's distribution. Set it to true."
        yield _violation(servers, "speculative-use-rejection-sampling", remedy)
    for name in _UNVERIFIED:
        kept = VERIFICATION_OPTIONS[name]
        if servers.options.get(name, kept) != kept:
            remedy = f"Tokens would not be known to come from the model's distribution. Remove it, or set it to {kept}."
            yield _violation(servers, name, remedy)
    if not servers.urls and servers.options.get("speculative-draft-load-format") in (None, "dummy"):
        remedy = (
            "Launched servers start with random weights, and no publication reaches the draft model. Set it to auto."
        )
        yield _violation(servers, "speculative-draft-load-format", remedy)


def _violation(servers: SGLangConfig, option: str, remedy: str) -> Violation:
    return Violation(f"rollout.sglang.arguments.{option}", servers.options.get(option), remedy)
