"""The verifier: grades responses as CORRECT, INCORRECT or UNDECIDED. Imports no torch."""

from oreal_megatron.verifier.api import StagedVerifier, build_verifier
from oreal_megatron.verifier.config import JudgeConfig, VerifierConfig

__all__ = ["JudgeConfig", "StagedVerifier", "VerifierConfig", "build_verifier"]
