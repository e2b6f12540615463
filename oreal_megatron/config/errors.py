"""Violations of a configuration, and the error that lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """A problem of the configuration."""

    key: str
    """Key with the wrong value, such as `parallel.tensor`."""
    value: Any
    """Value that was given."""
    remedy: str
    """Sentences that say what is wrong with the value and what to set."""

    def __str__(self) -> str:
        shown = repr(self.value)
        key = self.key if self.key.isprintable() else ascii(self.key)[1:-1]  # one line for each violation
        return f"{key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {self.remedy}"


class ConfigError(ValueError):
    """The configuration is wrong; the message lists every violation."""

    def __init__(self, violations: list[Violation], config: Any = None, *, host: str | None = None):
        """Makes the error of all violations.

        config: the TrainConfig, where every section is valid by itself and only checks across sections failed.
        host: name of the machine where the configuration is wrong; None: it is wrong everywhere.
        """
        self.violations = violations
        self.config = config
        self.host = host
        where = "" if host is None else f" on {host}"
        lines = "\n".join(f"  {violation}" for violation in violations)
        super().__init__(f"{len(violations)} problem(s) in the configuration{where}:\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Violation]]]:
        return ConfigError, (self.violations,)  # for pickling between processes
