"""Embedded generation against transformers' `generate`: same weights, prompts, batch and number of tokens.

python -m benchmarks.generation [--pairs 5]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.model import GEOMETRY, MODEL, VOCABULARY, policy_of
from benchmarks.pairs import compare
from oreal_megatron.config import ParallelConfig, SamplingConfig
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.distributed.cpu_backend import cpu_backend, device
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.types import GenerationRequest

BATCH, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=GEOMETRY.hidden_size,
            intermediate_size=GEOMETRY.ffn_hidden_size,
            num_hidden_layers=GEOMETRY.num_layers,
            num_attention_heads=GEOMETRY.num_attention_heads,
            num_key_value_heads=GEOMETRY.num_query_groups,
            max_position_embeddings=MODEL.max_sequence_length,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        reference.lm_head.weight *= 20  # from a flat distribution to nuclei of some tokens, as trained models have
    prompts = torch.randint(0, VOCABULARY, (BATCH, PROMPT_TOKENS)).to(device())
    with (
        tempfile.TemporaryDirectory() as directory,
        cpu_backend(),
        parallel_groups(ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=1), seed=0) as groups,
    ):
        reference.save_pretrained(directory)
        reference.to(device())
        policy = policy_of(groups)
        load_weights(policy, Path(directory), groups)
        # A stop token that no vocabulary has: every response takes all of its tokens, on both sides.
        engine = EmbeddedEngine(lambda: CachedDecoder(policy, groups, VOCABULARY), stop_token_id=-1, batch_size=BATCH)
        requests = [
            GenerationRequest(prompt_ids=tuple(prompt), seed=i, max_new_tokens=NEW_TOKENS)
            for i, prompt in enumerate(prompts.tolist())
        ]
        sampling = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=NEW_TOKENS)

        def theirs() -> None:
            reference.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_p=0.9,
                top_k=0,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
            )

        ours, peer, ratio = compare(lambda: list(engine.generate([requests], sampling)), theirs, pairs=arguments.pairs)
    tokens = BATCH * NEW_TOKENS
    parameters = sum(parameter.numel() for parameter in reference.parameters()) / 1e6
    print(
        f"{parameters:.1f}M parameters, batch {BATCH}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, temperature 1, top-p 0.9"
    )
    print(f"embedded     {tokens / ours:8.0f} tokens/s (with log-probabilities)")
    print(f"transformers {tokens / peer:8.0f} tokens/s")
    print(f"embedded takes {ratio:.2f} x the time of transformers (median of {arguments.pairs} pairs)")


if __name__ == "__main__":
    main()
