"""GGUF models as Hugging Face directories, dequantised to float32. Needs the extra `gguf`."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_in_package(name: str) -> Path:
    """Returns the *.gguf file of an installed package.

    name: import name of the package.

    Raises:
        ValueError: the package is not installed, or it has no or several *.gguf files.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"--package {name}: it is not installed. Run pip install {name.replace('_', '-')}.")
    found = [path for place in spec.submodule_search_locations for path in Path(place).rglob("*.gguf")]
    if len(found) != 1:
        raise ValueError(f"--package {name}: it has {len(found)} GGUF files. Name one with --gguf.")
    return found[0]


def from_gguf(source: Path, output: Path) -> int:
    """Writes a GGUF file as a Hugging Face directory and returns the number of parameters.

    The weights are those that transformers' own loader makes of the file.

    Raises:
        ValueError: the output directory exists.
    """
    if output.exists():
        raise ValueError(f"--output {output}: it exists. Name a new directory.")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers remembers the quantised source and refuses to save the weights in another type.
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return sum(parameter.numel() for parameter in model.parameters())
