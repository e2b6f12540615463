"""Records become conversations whose mask of trained tokens is exact, in an order that has no state."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oreal_megatron.config import AdamWConfig, PromptConfig, SftConfig
from oreal_megatron.data.conversation_files import read_conversations
from oreal_megatron.data.conversation_stream import ConversationStream, read_sft_data
from oreal_megatron.data.conversations import encoded, rendered
from oreal_megatron.data.packing import IGNORE, PackedSequence, pack
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from oreal_megatron.stopping import Stopped, StopRequest

OPTIMIZER = AdamWConfig(
    lr=1e-3, min_lr=0.0, warmup_steps=0, decay_steps=None, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, clip_grad=1.0
)
PROMPT = PromptConfig(
    system=None, user="{question}", stop_token="<|im_end|>", thinking_end_marks=(), max_prompt_tokens=64
)
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "\n2, as always"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4.\n\nIt is."},
]
# ChatML, with the marks by which transformers finds the assistant's tokens.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models have it: the reasoning of earlier turns is left out.
STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sft(**changes) -> SftConfig:
    base = {"steps": 1, "batch_size": 2, "demonstrations": None, "optimizer": OPTIMIZER}
    return SftConfig(**(base | changes))


def renderer(template=None, tokenizer=None) -> PromptRenderer:
    tokenizer = tokenizer or arithmetic_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return PromptRenderer(tokenizer, PROMPT, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, whose merges go over the ends of words and lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["assistant\n\n2, as always It is 4.\n\nIt is. 1+1? 2+2? user\nsystem\nBe brief."] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def conversation(record, where, render, *, turns="assistant") -> list[PackedSequence]:
    return encoded([rendered(record, where, render, turns=turns)], render)[0]


def trained_text(tokenizer, sequence: PackedSequence) -> list[str]:
    """The runs of trained tokens as text, from the labels of the packed sequence."""
    labels = pack([sequence], torch.device("cpu")).labels[0].tolist()
    runs, run = [], []
    for label in [*labels, IGNORE]:
        if label != IGNORE:
            run.append(label)
        elif run:
            runs, run = [*runs, tokenizer.decode(run)], []
    return runs


def test_loss_is_on_the_turns_of_the_assistant_and_their_ends():
    tokenizer = arithmetic_tokenizer()
    (sequence,) = conversation({"messages": TWO_TURNS}, "f:1", renderer())
    whole = tokenizer.decode([*sequence.prompt_ids, *sequence.response_ids])
    assert whole + "\n" == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert trained_text(tokenizer, sequence) == ["\n2, as always<|im_end|>", "It is 4.\n\nIt is.<|im_end|>"]
    batch = pack([sequence], torch.device("cpu"))
    assert batch.response_lengths == (len(batch.predicting),) == (sequence.num_trained_tokens,)
    (last,) = conversation({"messages": TWO_TURNS}, "f:1", renderer(), turns="last_assistant")
    assert trained_text(tokenizer, last) == ["It is 4.\n\nIt is.<|im_end|>"] and last.loss_mask is None
    unweighted = [*TWO_TURNS[:-1], {**TWO_TURNS[-1], "weight": 0}]
    (first,) = conversation({"messages": unweighted}, "f:1", renderer())
    assert trained_text(tokenizer, first) == ["\n2, as always<|im_end|>"]


def test_mask_equals_that_of_transformers_where_the_template_marks_the_assistant():
    tokenizer = arithmetic_tokenizer()
    (sequence,) = conversation({"messages": TWO_TURNS}, "f:1", renderer(MARKED))
    expected = tokenizer.apply_chat_template(
        TWO_TURNS, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [*sequence.prompt_ids, *sequence.response_ids]
    mask = [0] * len(sequence.prompt_ids) + sequence.loss_mask.astype(int).tolist()
    assert ids == expected["input_ids"][: len(ids)] and mask == expected["assistant_masks"][: len(ids)]
    assert sum(expected["assistant_masks"]) == sum(mask)


def test_prompts_of_trained_turns_are_those_of_generation_although_a_tokenizer_merges_over_their_ends(merging):
    render = renderer(MARKED, merging)
    # Encoded with its turn, the end of the opening merges with the turn: generation never sees that token.
    whole = merging.encode(merging.apply_chat_template(TWO_TURNS[:3], tokenize=False), add_special_tokens=False)
    prompt = tuple(render.encode([render.message_text(TWO_TURNS[:2])])[0])
    assert tuple(whole[: len(prompt)]) != prompt
    first, second = conversation({"messages": TWO_TURNS}, "f:1", render)
    assert tuple(first.prompt_ids) == prompt
    assert tuple(second.prompt_ids) == tuple(render.encode([render.message_text(TWO_TURNS[:4])])[0])
    for sequence, index in ((first, 2), (second, 4)):
        assert trained_text(merging, sequence) == [TWO_TURNS[index]["content"] + "<|im_end|>"]
    assert (first.id, second.id) == ("f:1 part 1", "f:1 part 2")


def test_turn_keeps_its_reasoning_although_the_template_drops_it_from_earlier_turns():
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>add</think>2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>more</think>4"},
    ]
    tokenizer = arithmetic_tokenizer()
    first, second = conversation({"messages": messages}, "f:1", renderer(STRIPPING))
    assert trained_text(tokenizer, first) == ["<think>add</think>2<|im_end|>"]
    assert trained_text(tokenizer, second) == ["<think>more</think>4<|im_end|>"]
    assert "add" not in tokenizer.decode(second.prompt_ids)
    opening = STRIPPING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(ValueError, match=r"f:1: the response begins with <think>.*Remove <think>"):
        conversation({"messages": messages[:2]}, "f:1", renderer(opening))


def progress(title, total):
    return nullcontext(SimpleNamespace(advance=lambda note, by: None))


def read(path, config=None, *, max_tokens=128, split=None, limit=None, render=None):
    reading = read_conversations(
        str(path),
        split,
        render or renderer(),
        config or sft(),
        directory=path.parent / "encoded",
        max_tokens=max_tokens,
        progress=progress,
        limit=limit,
    )
    while True:
        try:
            next(reading)
        except StopIteration as finished:
            return finished.value[0]


def test_files_of_every_format_give_the_same_conversations(tmp_path):
    records = [{"prompt": f"{n}+1?", "response": f"It is {n + 1}."} for n in range(5)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    saved = tmp_path / "saved" / "test"
    saved.mkdir(parents=True)
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (saved.parent / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    of_question = [conversation({"question": r["prompt"], "response": r["response"]}, "", renderer()) for r in records]
    expected = [(list(one.prompt_ids), list(one.response_ids)) for (one,) in of_question]
    for path, split in (
        (lines, None),
        (tmp_path / "a.json", None),
        (tmp_path / "a.parquet", None),
        (saved.parent, "test"),
    ):
        found = read(path, split=split)
        assert [(list(one.prompt_ids), list(one.response_ids)) for one in found] == expected, path
    assert len(read(lines, limit=2)) == 2 and read(lines)[3].id == f"{lines}:4"


GOOD = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "r.jsonl:2: an object is expected, not list"),
        ({"question": "1+1", "output": "2"}, "`response` is missing. Keys of the line: question, output. These fit:"),
        ({"question": " ", "response": "2"}, "`question` or `response` is empty. Remove the record."),
        ({"messages": []}, "`messages` is []. Give it a list of {role, content}."),
        ({"messages": "hello"}, "`messages` is 'hello'. Give it a list"),
        ({"messages": ["hello"]}, "`messages[0]` is 'hello'. Give it role and content."),
        ({"messages": [{"role": "human", "content": "x"}]}, "`messages[0].role` is 'human'. Set it to system, user,"),
        ({"messages": [GOOD, {"role": "assistant", "content": ""}]}, "`messages[1].content` is ''. Give it a text"),
        ({"messages": [GOOD, {"role": "assistant", "content": None}]}, "`messages[1].content` is None. Give"),
        ({"messages": [GOOD, {"role": "assistant", "content": "2", "weight": 0.5}]}, "weight` is 0.5. Set it to 0"),
        ({"messages": [{"role": "assistant", "content": "2"}]}, "'assistant', before any question. Remove"),
        ({"messages": [GOOD]}, "no turn of the assistant to train on. Remove the record."),
        (
            {"messages": [GOOD, {"role": "assistant", "content": "2", "reasoning_content": "1+1 is 2"}]},
            "`messages[1]` has 'reasoning_content', which would be lost",
        ),
        ({"messages": [GOOD, {"role": "assistant", "content": "2"}], "tools": [{}]}, "`tools` would be lost"),
    ],
)  # fmt: skip
def test_bad_record_is_refused_with_file_line_key_and_remedy(tmp_path, record, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "1+1?", "response": "2"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert message in str(caught.value) and f"{path}:2: " in str(caught.value)


def test_template_that_refuses_a_conversation_is_named_with_the_record(tmp_path):
    strict = "{% for m in messages %}{{ raise_exception('roles must alternate') if loop.index > 1 }}{% endfor %}"
    with pytest.raises(ValueError, match=r"f:7: the chat template of model\.tokenizer refuses .* roles must alternate"):
        conversation({"messages": TWO_TURNS}, "f:7", renderer(strict))
    never = "{{ raise_exception('no system message') }}"
    with pytest.raises(ValueError, match=r"f:8: the chat template .* refuses the prompt: no system message"):
        conversation({"question": "1+1?", "response": "2"}, "f:8", renderer(never))


def test_overlong_conversations_are_counted_and_treated_as_asked(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    questions = ["1+1?", "1" * 60, "1+2?", "2" * 5]
    responses = ["2", "3", "4" * 80, "5"]
    records = [{"question": q, "response": r} for q, r in zip(questions, responses, strict=True)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lengths = [one.num_tokens for one in read(path, max_tokens=1000)]
    assert lengths[1] > 40 and lengths[2] > 80
    with pytest.raises(ValueError) as caught:
        read(path, max_tokens=40)
    for part in (
        "2 of 4 conversations",
        "max_sequence_length = 40",
        f"{path}:2",
        f"longest: {lengths[2]}",
        "sft.overlong=drop",
    ):
        assert part in str(caught.value)
    kept = read(path, sft(overlong="drop"), max_tokens=40)
    assert [one.num_tokens for one in kept] == [lengths[0], lengths[3]]
    assert "2 of 4 conversations" in caplog.text and "2 are left out" in caplog.text
    cut = read(path, sft(overlong="truncate"), max_tokens=40)
    assert [one.num_tokens for one in cut] == [lengths[0], 40, lengths[3]], "of the long question no response is left"
    assert (
        cut[1].response_ids.tolist() == read(path, max_tokens=1000)[2].response_ids.tolist()[: len(cut[1].response_ids)]
    )
    assert "1 are cut off, 1 are left out" in caplog.text
    with pytest.raises(ValueError, match=r"none is left. Set model\.max_sequence_length="):
        read(path, sft(overlong="drop"), max_tokens=3)


def stream(sizes=(10,), weights=(1.0,), batch_size=4, seed=0) -> ConversationStream:
    return ConversationStream(sizes=sizes, weights=weights, fingerprint="a", batch_size=batch_size, seed=seed)


def test_every_epoch_has_every_conversation_once_in_an_order_of_its_own():
    one = stream()
    drawn = [index for step in range(10) for index in one.batch(step)]
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [stream().batch(step) for step in (7, 3, 9)] == [one.batch(step) for step in (7, 3, 9)], "no state"
    assert one.num_steps(1) == 3 and one.num_steps(2) == 5 and one.epoch_after(5) == 2.0
    assert stream(seed=1).batch(0) != one.batch(0)


def test_sources_occur_as_often_as_their_weights_say():
    mixed = stream(sizes=(8, 4, 30), weights=(2.0, 1.0, 0.1), batch_size=23)
    assert mixed.epoch_size == 23
    first, second = (Counter(mixed.batch(epoch)) for epoch in (0, 1))
    for counts in (first, second):
        assert [counts[index] for index in range(12)] == [2] * 8 + [1] * 4
        assert sum(counts[index] for index in range(12, 42)) == 3
    assert not {i for i in first if i >= 12} & {i for i in second if i >= 12}, "a part, and then another part"
    ten = Counter(index for epoch in range(10) for index in mixed.batch(epoch))
    assert all(ten[index] == 1 for index in range(12, 42))


def test_stream_refuses_the_checkpoint_of_other_records(single_process, tmp_path):
    path = tmp_path / "r.jsonl"

    def data(response: str):
        path.write_text(json.dumps({"question": "1+1?", "response": response}) + "\n")
        return read_sft_data(
            sft(demonstrations=str(path)), renderer(), None, single_process, StopRequest(),
            directory=tmp_path / "encoded", max_tokens=64, seed=0, progress=progress,
        )  # fmt: skip

    state = data("2").stream.state_dict()
    data("2").stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of other records \(1 conversations .* another run\.dir"):
        data("3").stream.load_state_dict(state)


def many(tmp_path, number=3000):
    path = tmp_path / "many.jsonl"
    turns = [{"messages": [*TWO_TURNS[:3], {"role": "user", "content": f"{i}?"}, TWO_TURNS[4]]} for i in range(number)]
    path.write_text("".join(json.dumps(record) + "\n" for record in turns))
    return path


def test_encoded_records_are_read_again_without_encoding_them(tmp_path, monkeypatch):
    path = many(tmp_path)
    first = read(path)
    (file,) = (tmp_path / "encoded").glob("*.arrow")
    assert len(first) == 3000
    monkeypatch.setattr("oreal_megatron.data.conversation_files.encoded", None)
    again = read(path)
    assert again.digest == first.digest and again.num_tokens == sum(one.num_tokens for one in first)
    (expected,) = conversation(json.loads(path.read_text().splitlines()[2500]), f"{path}:2501", renderer())
    for found in (first[2500], again[2500]):
        assert found.id == expected.id
        for name in ("prompt_ids", "response_ids", "loss_mask"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    monkeypatch.undo()
    # What the tokens depend on has a file of its own.
    longer = "{% if true %}x{% endif %}" + MARKED
    others = [read(path, sft(turns="last_assistant")), read(path, limit=7), read(path, render=renderer(longer))]
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    others.append(read(path))
    assert len({first.digest, *(one.digest for one in others)}) == 5
    assert len(list(file.parent.iterdir())) == 5


def test_heldout_records_are_not_those_that_are_trained(single_process, tmp_path, caplog):
    for split, numbers in ("train", range(6)), ("test", range(4, 14)):
        path = tmp_path / "set" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        asked = [f"What is {n} + 1?" if split == "train" else f"what is ${n}+1$" for n in numbers]
        path.write_text("".join(json.dumps({"question": q, "response": "r"}) + "\n" for q in asked))

    def data(heldout, **changes):
        return read_sft_data(
            sft(**({"demonstrations": str(path.parent), "heldout": heldout} | changes)), renderer(), None,
            single_process, StopRequest(), directory=tmp_path / "encoded", max_tokens=128, seed=0, progress=progress,
        )  # fmt: skip

    for same in (
        {"heldout": {"path": str(path.parent)}},
        {"heldout": {"path": str(path.parent / "train.jsonl"), "limit": 2}},
        {"heldout": {"path": str(path.parent), "split": "test"}, "demonstrations": str(path)},
    ):
        with pytest.raises(ValueError, match=r"sft\.heldout\.path = .* is trained on too, by sft\.demonstrations"):
            data(**same)
    named = {"demonstrations": None, "sources": {"math": {"path": str(path.parent)}}}
    with pytest.raises(ValueError, match=r"by sft\.sources\.math"):
        data({"path": str(path.parent)}, **named)
    found = data({"path": str(path.parent), "split": "test"})
    assert len(found.heldout) == 10 and found.stream.sizes == (6,)
    assert "2 of 10 conversations begin with a prompt that is trained on" in caplog.text


def test_another_version_of_a_file_with_its_size_and_time_is_encoded(tmp_path):
    path = many(tmp_path)
    first, stat = read(path), path.stat()
    (tmp_path / "other").write_text(path.read_text().replace("1", "2"))
    (tmp_path / "other").rename(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and read(path).digest != first.digest


def test_shared_prompts_are_those_of_conversations_that_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1", "response": "9 " * n}) + "\n" for n in (1, 2, 60))
    )
    kept = read(tmp_path / "a.jsonl", sft(overlong="drop"), max_tokens=60)
    every = read(tmp_path / "a.jsonl", max_tokens=4000)
    assert len(kept) == 2 and len(every) == 3
    assert every.num_common([kept]) == kept.num_common([every]) == 2


def test_stop_while_records_are_encoded_leaves_no_part_of_a_file(single_process, tmp_path):
    path, stop, asked = many(tmp_path), StopRequest(), []

    def stopping(title, total):
        def advance(note, by):
            asked.append(by)
            stop._receive(15, None)

        return nullcontext(SimpleNamespace(advance=advance))

    def data(stop, progress):
        return read_sft_data(
            sft(demonstrations=str(path)), renderer(), None, single_process, stop, directory=tmp_path / "encoded",
            max_tokens=128, seed=0, progress=progress,
        )  # fmt: skip

    with pytest.raises(Stopped, match="stopped while records were encoded"):
        data(stop, stopping)
    assert len(asked) == 1 and asked[0] < 3000 and list((tmp_path / "encoded").iterdir()) == []
    (tmp_path / "encoded/left.arrow").write_text("of other settings")
    assert data(StopRequest(), progress).stream.sizes == (3000,)
    assert len(list((tmp_path / "encoded").iterdir())) == 1


def test_packing_keeps_the_mask_of_every_conversation():
    sequences = [
        PackedSequence(id="a", prompt_ids=(1, 2), response_ids=(3, 4, 5, 6), loss_mask=np.array([1, 0, 0, 1], bool)),
        PackedSequence(id="b", prompt_ids=(7,), response_ids=(8,)),
    ]
    batch = pack(sequences, torch.device("cpu"))
    no = IGNORE
    assert batch.labels.tolist() == [[no, 3, no, no, 6, no, 8, no]] and batch.response_lengths == (2, 1)
    assert [part.tolist() for part in batch.split_by_sequence(torch.arange(3))] == [[0, 1], [2]]
