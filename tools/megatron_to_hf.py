"""One model of a Megatron distributed checkpoint as a Hugging Face directory that transformers and servers load.

    python tools/megatron_to_hf.py checkpoints/smollm2 exported/smollm2
    python tools/megatron_to_hf.py runs/math/checkpoints/step_000002 exported/rm --model reward_model \\
        --like runs/math/huggingface/assets

A reward model comes out in the shape of AutoModelForTokenClassification with one label. Killed, the same command goes
on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oreal_megatron.cli.conversion_tools import progress_bar, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory with .metadata and *.distcp files")
    parser.add_argument("output", type=Path, help="directory to make; must be empty or not there")
    parser.add_argument(
        "--model",
        choices=("policy", "reward_model"),
        help="which model of a run's checkpoint; none: the checkpoint is one",
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="directory with config.json and tokenizer; none: those that hf_to_megatron put into the checkpoint",
    )
    arguments = parser.parse_args()

    # Only now: --help should not wait for torch.
    from oreal_megatron.conversion.convert import Export

    export = Export.plan(
        arguments.source,
        arguments.output,
        prefix=f"{arguments.model}." if arguments.model else "",
        head="scalar" if arguments.model == "reward_model" else None,
        assets=arguments.like,
    )
    export.open()
    with progress_bar("to Hugging Face", export.num_bytes) as advance:
        for shard in export.shards:
            export.write(shard, advance)
    export.commit()
    print(f"{arguments.output}: {len(export.model.table.origins)} tensors, {export.num_bytes:,} bytes")


if __name__ == "__main__":
    run(main)
