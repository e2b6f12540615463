"""Compares a Hugging Face directory with a Megatron checkpoint, as `oreal-convert compare` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.convert import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
