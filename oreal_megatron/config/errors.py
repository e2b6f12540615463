"""What is wrong with a configuration, as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong: where, what was given, what would be right."""

    key: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        shown = repr(self.value)
        return f"{self.key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {self.remedy}"


class ConfigError(ValueError):
    """The configuration is wrong; the message lists every violation."""

    def __init__(self, violations: list[Violation], config: Any = None):
        """config: the TrainConfig, where each section is sound and only their agreement is not."""
        self.violations = violations
        self.config = config
        lines = "\n".join(f"  {violation}" for violation in violations)
        super().__init__(f"{len(violations)} problem(s) in the configuration:\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Violation]]]:
        return ConfigError, (self.violations,)  # from one process to another
