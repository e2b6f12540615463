"""Writes a GGUF model as a Hugging Face directory, as `oreal-convert from-gguf` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.convert import main

if __name__ == "__main__":
    main(["from-gguf", *sys.argv[1:]])
