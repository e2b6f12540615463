"""Grade a JSONL file of answers: `python tools/verify_answers.py IN.jsonl --output OUT.jsonl`; `--help` says more."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.verifier.cli import main

if __name__ == "__main__":
    sys.exit(main())
