"""Encoding of the records of supervised fine-tuning: in batches, against one record after the other.

The records are made of pieces of this repository's documents. `read again` is a further start of the same run.

    python -m benchmarks.sft_encoding DIRECTORY_OF_A_TOKENIZER [--records 20000] [--characters 2000]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from oreal_megatron.config import AdamWConfig, PromptConfig, SftConfig
from oreal_megatron.data.conversation_files import Conversations, read_conversations
from oreal_megatron.data.conversations import encoded, rendered
from oreal_megatron.data.curation.sources import read_source
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZER = AdamWConfig(
    lr=1e-3, min_lr=0.0, warmup_steps=0, decay_steps=None, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, clip_grad=1.0
)
SFT = SftConfig(steps=1, batch_size=1, demonstrations=None, optimizer=OPTIMIZER)
PROMPT = PromptConfig(
    system=None, user="{question}", stop_token="<|im_end|>", thinking_end_marks=(), max_prompt_tokens=1024
)


def write_records(path: Path, number: int, characters: int) -> None:
    """Writes records with responses of `characters` characters."""
    text = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(number):
            start = rng.randrange(len(text) - characters)
            record = {"question": f"Continue the text of page {index}.", "response": text[start : start + characters]}
            file.write(json.dumps(record) + "\n")


def in_batches(path: Path, directory: Path, renderer: PromptRenderer) -> Conversations:
    """Reads the records as a run does."""
    bar = contextlib.nullcontext(SimpleNamespace(advance=lambda note, by: None))
    reading = read_conversations(
        str(path), None, renderer, SFT, directory=directory, max_tokens=1 << 20, progress=lambda title, total: bar
    )
    while True:
        try:
            next(reading)
        except StopIteration as finished:
            return finished.value[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--characters", type=int, default=2_000)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    renderer = PromptRenderer(tokenizer, PROMPT, vocab_size=len(tokenizer))
    with tempfile.TemporaryDirectory() as made:
        path, directory = Path(made, "records.jsonl"), Path(made, "encoded")
        write_records(path, arguments.records, arguments.characters)
        seconds = []
        for run in ("one by one", "in batches", "read again"):
            started, cpu = time.perf_counter(), time.process_time()
            if run == "one by one":
                for where, record in read_source([path]):
                    encoded([rendered(record, where, renderer, turns="assistant")], renderer)
            else:
                tokens = in_batches(path, directory, renderer).num_tokens
            seconds.append((run, time.perf_counter() - started, time.process_time() - cpu))
    for run, wall, cpu in seconds:
        print(f"{run}  {tokens / wall:12,.0f} tokens/s  {wall:.2f} s, {cpu:.2f} s of all CPUs")
    print(f"ratio of one by one to in batches: {seconds[0][1] / seconds[1][1]:.2f}")


if __name__ == "__main__":
    main()
