"""Writes a model of a Megatron checkpoint as a Hugging Face directory, as `oreal-convert to-hf` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.convert import main

if __name__ == "__main__":
    main(["to-hf", *sys.argv[1:]])
