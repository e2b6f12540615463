"""A training step on packed sequences against the same step on padded ones, and the ratio of their tokens.

Padded: every sequence filled up to the longest, as rows of a batch would be, within the same budget of tokens.

    python -m benchmarks.packing [--pairs 5] [--sequences 24]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.model import GEOMETRY, VOCABULARY
from benchmarks.pairs import compare
from benchmarks.training_step import oreal_step, sequences
from oreal_megatron.config import ParallelConfig
from oreal_megatron.data.packing import Packer, Padding
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=24)
    arguments = parser.parse_args()
    with (
        cpu_backend(),
        parallel_groups(ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=2048), seed=0) as groups,
    ):
        chosen = sequences(arguments.sequences)
        longest = max(sequence.num_tokens for sequence in chosen)
        packer = Packer.of_layout(groups, GEOMETRY, VOCABULARY)
        packed = packer.batches(chosen)
        padded = replace(packer, padding=Padding(sequence=longest, row=longest)).batches(chosen)
        mine, peer, ratio = compare(
            oreal_step(packed, chosen, groups), oreal_step(padded, chosen, groups), pairs=arguments.pairs
        )
    few, many = (sum(batch.tokens.size(1) for batch in batches) for batches in (packed, padded))
    print(f"packed  {mine:.2f} s  {few} tokens\npadded  {peer:.2f} s  {many} tokens")
    print(
        f"packed takes {ratio:.2f} x the time of padded (median of {arguments.pairs} pairs; aim: near the ratio of "
        f"tokens, {few / many:.2f})"
    )


if __name__ == "__main__":
    main()
