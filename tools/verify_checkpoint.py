"""Compares a Hugging Face directory with a Megatron distributed checkpoint of the same model, bit for bit.

    python tools/verify_checkpoint.py models/smollm2 checkpoints/smollm2

Exits with 1 where a bit differs, and names the tensors. With one directory alone, checks that it is whole: index,
shards, names, shapes and dtypes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.conversion_tools import progress_bar, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("huggingface", type=Path, help="directory with config.json and safetensors")
    parser.add_argument("megatron", type=Path, nargs="?", help="directory with .metadata and *.distcp files")
    parser.add_argument("--model", choices=("policy", "reward_model"), help="which model of a run's checkpoint")
    arguments = parser.parse_args()

    # Only now: --help should not wait for torch.
    from oreal_megatron.conversion.convert import compare
    from oreal_megatron.conversion.huggingface import read_model
    from oreal_megatron.conversion.layout import Layout
    from oreal_megatron.conversion.report import plan
    from oreal_megatron.conversion.weights import HuggingFaceWeights

    planned = plan(read_model(arguments.huggingface), Layout())
    if arguments.megatron is None:
        HuggingFaceWeights(arguments.huggingface).check(planned.model.table)
        print(f"{arguments.huggingface} is whole: {planned.num_tensors} tensors, {planned.num_elements:,} elements")
        return 0
    prefix = f"{arguments.model}." if arguments.model else ""
    with progress_bar("comparing", planned.num_bytes) as advance:
        found = compare(arguments.huggingface, arguments.megatron, prefix=prefix, advance=advance)
    for line in found.differences:
        print(f"differs: {line}")
    same = found.num_tensors - len(found.differences)
    print(f"{same} of {found.num_tensors} Megatron tensors are equal, bit for bit ({found.num_elements:,} elements)")
    return 1 if found.differences else 0


if __name__ == "__main__":
    run(main)
