"""Grades a JSONL file of answers, as `oreal-verify` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.verify import main

if __name__ == "__main__":
    main()
