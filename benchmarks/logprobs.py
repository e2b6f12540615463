"""Log-probabilities over a large vocabulary: ours against Megatron-Core's stock path, in time and in peak memory.

Stock: all logits, then Megatron-Core's vocabulary-parallel cross-entropy. Ours: a tile of logits (positions x tokens)
at a time, made again in the backward pass, and the entropies besides. Both forward and backward, from the same hidden
states, fp32. Memory is what the process' resident set grows by, each way in a process of its own, the gradient of
the output layer included.

    python -m benchmarks.logprobs [--tokens 2048] [--hidden 512] [--chunk 1024] [--pairs 3]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from benchmarks.pairs import compare
from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend, device, peak_memory, reset_peak_memory
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.policy import CPU_TILE, token_logprobs

VOCABULARY = 151_936


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--memory-of", choices=("ours", "stock"), help="only print the growth in MiB, of one way")
    arguments = parser.parse_args()
    with cpu_backend(), parallel_groups(ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=1), seed=0) as groups:
        ours, stock = ways(arguments, groups)
        if arguments.memory_of:
            print(growth(ours if arguments.memory_of == "ours" else stock))
            return
        theirs = {way: float(memory_in_own_process(way)) for way in ("ours", "stock")}
        mine, peer, ratio = compare(ours, stock, pairs=arguments.pairs)
    print(f"{arguments.tokens} tokens, hidden size {arguments.hidden}, V = {VOCABULARY}, chunks of {arguments.chunk}")
    print(f"chunked  {mine:.2f} s  {theirs['ours']:.0f} MiB\nstock    {peer:.2f} s  {theirs['stock']:.0f} MiB")
    print(
        f"ours takes {ratio:.2f} x the time (median of {arguments.pairs} pairs; aim: at most 1.4) and "
        f"{theirs['ours'] / theirs['stock']:.2f} x the peak memory (aim: at most 0.3) of Megatron-Core's stock path"
    )


def ways(arguments: argparse.Namespace, groups: ParallelGroups) -> tuple[Callable[[], None], Callable[[], None]]:
    """(ours, stock): each makes log-probabilities and the gradients of their sum."""
    generator = torch.Generator(device()).manual_seed(0)
    options: Any = {"generator": generator, "device": device()}
    hidden = torch.randn(arguments.tokens, arguments.hidden, **options).requires_grad_()
    weight = torch.randn(VOCABULARY, arguments.hidden, **options).mul_(0.02).requires_grad_()
    target = torch.randint(0, VOCABULARY, (arguments.tokens,), **options)
    size = CPU_TILE if device().type == "cpu" else None

    def ours() -> None:
        hidden.grad = weight.grad = None
        logprobs, _ = token_logprobs(
            hidden, weight, target, 0, chunk=arguments.chunk, size=size, group=groups.collection.tp
        )
        logprobs.sum().backward()

    def stock() -> None:
        hidden.grad = weight.grad = None
        logits = torch.nn.functional.linear(hidden.unsqueeze(1), weight)
        vocab_parallel_cross_entropy(logits.float(), target.unsqueeze(1)).sum().backward()

    return ours, stock


def growth(way: Callable[[], None]) -> float:
    """MiB by which the resident set grows at its highest."""
    reset_peak_memory()
    before = peak_memory()
    way()
    after = peak_memory()
    assert before is not None and after is not None, "/proc/self/status has no VmHWM here"
    return (after - before) / 2**20


def memory_in_own_process(way: str) -> str:
    command = [sys.executable, "-m", "benchmarks.logprobs", *sys.argv[1:], "--memory-of", way]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
