"""The check of a model family: weights there and back, and log-probabilities of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from oreal_megatron.config import ModelConfig, ParallelConfig
from oreal_megatron.conversion.convert import compare, to_huggingface, to_megatron
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.data.packing import PackedSequence, pack
from oreal_megatron.distributed.cpu_backend import cpu_backend, device
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.virtual_stages import chunks_of

LAYOUTS = (Layout(), Layout(tensor=2), Layout(pipeline=2, vocabulary_multiple=64))
_LENGTHS = ((3, 8), (9, 2), (1, 5), (4, 1))
"""Tokens of prompts and responses whose log-probabilities are compared."""


def check_model_family(
    model: Path,
    work: Path,
    *,
    layouts: Sequence[Layout] = LAYOUTS,
    groups: ParallelGroups | None = None,
    tolerance: float = 2e-5,
) -> None:
    """Checks the conversion and the decoder of a model's family, on a small model of it.

    - Its weights come to Megatron-Core and back bit for bit, in every layout.
    - The policy's log-probabilities are those of transformers, in fp32, within `tolerance` nats.

    model: a Hugging Face directory with safetensors, such as transformers saves with random weights. Biases and norms
    should be away from their initial values, and an even number of layers and heads suits all layouts. work: an empty
    directory for the conversions. groups: of one process; None: they are made, which needs that there are none.

    Raises:
        ValueError: the family is not supported, or a layout does not suit the model.
        AssertionError: a check fails. The message has all that fail.
    """
    faults = [
        fault for number, layout in enumerate(layouts) for fault in _round_trip(model, work / str(number), layout)
    ]
    with contextlib.nullcontext(groups) if groups is not None else _single_process() as own:
        assert own is not None
        faults += _faults_of_logprobs(model, own, tolerance)
    assert not faults, f"the family of {model} fails:\n" + "\n".join(f"  - {fault}" for fault in faults)


@contextlib.contextmanager
def _single_process() -> Iterator[ParallelGroups]:
    parallel = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=512)
    with cpu_backend(), parallel_groups(parallel, seed=0) as groups:
        yield groups


def _round_trip(model: Path, work: Path, layout: Layout) -> Iterator[str]:
    """Yields what differs after a conversion to a layout and back."""
    work.mkdir(parents=True)
    to_megatron(model, work / "megatron", layout)
    for name, difference in compare(model, work / "megatron").items():
        yield f"{layout}: {name} in Megatron-Core: {difference}"
    to_huggingface(work / "megatron", work / "huggingface")
    before, after = _tensors(model), _tensors(work / "huggingface")
    for name in sorted(before.keys() ^ after.keys()):
        yield f"{layout}: {name} is {'lost' if name in before else 'new'} after the way back"
    for name in sorted(before.keys() & after.keys()):
        same = before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
        if not same:
            yield f"{layout}: {name} has other bits after the way back"


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def _faults_of_logprobs(path: Path, groups: ParallelGroups, tolerance: float) -> Iterator[str]:
    """Yields the largest difference from transformers' log-probabilities, if it is above the tolerance."""
    from transformers import AutoModelForCausalLM

    geometry = geometry_of(path)
    assert geometry.vocab_size is not None
    config = ModelConfig(
        path=str(path),
        geometry=None,
        tokenizer="unused",
        implementation="local",
        dtype="float32",
        max_sequence_length=64,
    )
    policy = build_policy(geometry, config, groups, vocab_size=geometry.vocab_size, seed=0)
    for chunk in chunks_of(policy):
        load_weights(chunk.to(device()), path, groups)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, geometry.vocab_size or 1, (length,), generator=generator).tolist())

    sequences = [
        PackedSequence(id=str(n), prompt_ids=ids(prompt), response_ids=ids(response))
        for n, (prompt, response) in enumerate(_LENGTHS)
    ]
    batch = pack(sequences, device())
    (found_R,) = score(policy, [batch], lambda output, b: output[b.predicting, 0].clone(), groups)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for sequence, found_T in zip(sequences, batch.split_by_sequence(found_R.cpu()), strict=True):
        whole = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        with torch.no_grad():
            rows = reference(whole).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
        expected_T = rows.gather(1, torch.tensor(list(sequence.response_ids))[:, None])[:, 0]
        worst = (found_T - expected_T).abs().max().item()
        if not worst <= tolerance:
            length = len(sequence.prompt_ids)
            yield f"log-probabilities differ from those of transformers by {worst:.3g} nats after {length} tokens"
