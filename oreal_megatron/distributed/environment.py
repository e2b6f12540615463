"""Environment variables that the libraries below torch read, and that trainer and servers must agree on (no torch)."""

from __future__ import annotations

NCCL_WITHOUT_CUMEM = ("NCCL_CUMEM_ENABLE", "0")
"""Variable and value that SGLang sets. With another value on one side, NCCL cannot open the memory of a process of the
same machine, and a direct publication fails. A value that is set already holds for both sides."""
