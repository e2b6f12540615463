"""Prompts to groups of rollouts, through any engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oreal_megatron.config import SamplingConfig
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.rollout.engine import GenerationRequest, RolloutEngine
from oreal_megatron.seeds import derive_seed


class Sampler:
    """Renders prompts, asks the engine for responses, and makes records of them."""

    def __init__(self, engine: RolloutEngine, renderer: PromptRenderer, *, max_sequence_length: int):
        self._engine = engine
        self._renderer = renderer
        self._max_sequence_length = max_sequence_length

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        sampling: SamplingConfig,
        seed_of: Callable[[Prompt, int], int],
    ) -> list[list[Rollout]]:
        """A group of `num_samples` rollouts a prompt, in order.

        seed_of: (prompt, sample index) -> seed; see `rollout_seeds`.

        Raises:
            ValueError: a prompt leaves no room for a response.
        """
        requests = []
        for prompt in prompts:
            prompt_ids = self._renderer.token_ids(prompt)
            room = self._max_sequence_length - len(prompt_ids)
            if room < 1:
                raise ValueError(
                    f"prompt {prompt.id} has {len(prompt_ids)} tokens and leaves no room for a response in "
                    f"model.max_sequence_length = {self._max_sequence_length}"
                )
            requests += [
                GenerationRequest(
                    prompt_ids=prompt_ids,
                    seed=seed_of(prompt, index),
                    max_new_tokens=min(room, sampling.max_new_tokens),
                )
                for index in range(num_samples)
            ]
        completions = self._engine.generate(requests, sampling)
        rollouts = [
            Rollout(
                prompt=prompts[index // num_samples],
                sample_index=index % num_samples,
                prompt_ids=request.prompt_ids,
                response_ids=completion.token_ids,
                logprobs=completion.logprobs,
                text=self._renderer.response_text(completion.token_ids),
                finish_reason=completion.finish_reason,
                weight_version=completion.weight_version,
            )
            for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]
        return [rollouts[start : start + num_samples] for start in range(0, len(rollouts), num_samples)]


def rollout_seeds(run_seed: int, purpose: str, step: int) -> Callable[[Prompt, int], int]:
    """Seeds that depend on (run seed, purpose, step, prompt, sample) and on nothing else."""
    return lambda prompt, index: derive_seed(run_seed, purpose, step, prompt.id, index)
