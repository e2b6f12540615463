"""A Hugging Face directory as a Megatron distributed checkpoint (torch_dist), which any TP, PP and VPP loads.

    python tools/hf_to_megatron.py models/smollm2 checkpoints/smollm2
    python tools/hf_to_megatron.py Qwen2.5-32B/config.json --plan --tensor-parallel 8 --pipeline-parallel 2

The layout says how chunks and files are cut, so that each rank of that layout reads its own ones; every other layout
loads the checkpoint too. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.conversion_tools import progress_bar, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory with config.json, safetensors and tokenizer")
    parser.add_argument("output", type=Path, nargs="?", help="directory to make; must be empty or not there")
    parser.add_argument(
        "--plan", action="store_true", help="print what goes where and write nothing; needs config.json only"
    )
    parser.add_argument("--tensor-parallel", type=positive, default=1, metavar="N")
    parser.add_argument("--pipeline-parallel", type=positive, default=1, metavar="N")
    parser.add_argument("--virtual-pipeline", type=positive, default=1, metavar="N", help="runs of layers of a stage")
    parser.add_argument(
        "--vocabulary-multiple",
        type=positive,
        default=1,
        metavar="N",
        help="pad the vocabulary to a multiple of N x tensor ranks (Megatron-LM's --make-vocab-size-divisible-by)",
    )
    arguments = parser.parse_args()
    if arguments.plan == (arguments.output is not None):
        parser.error("give an output directory, or --plan")

    # Only now: --help should not wait for torch.
    from oreal_megatron.conversion.convert import BLOCK_BYTES, to_megatron
    from oreal_megatron.conversion.huggingface import read_model
    from oreal_megatron.conversion.layout import Layout
    from oreal_megatron.conversion.report import plan

    layout = Layout(
        arguments.tensor_parallel,
        arguments.pipeline_parallel,
        arguments.virtual_pipeline,
        arguments.vocabulary_multiple,
    )
    planned = plan(read_model(arguments.source), layout)
    if arguments.plan:
        print("\n".join(planned.lines(peak_bytes=BLOCK_BYTES)))
        return
    with progress_bar("to Megatron", planned.num_bytes) as advance:
        to_megatron(arguments.source, arguments.output, layout, advance=advance)
    print(f"{arguments.output}: {planned.num_elements / 1e6:.1f}M parameters, {planned.num_bytes:,} bytes")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


if __name__ == "__main__":
    run(main)
