"""Data files as people have them: other formats, other names, empty and repeated records."""

from __future__ import annotations

import gzip
import json
import shlex

import pyarrow
import pyarrow.parquet
import pytest

from oreal_megatron.cli.data import main
from oreal_megatron.config import parse_config
from oreal_megatron.data.prompts import read_demonstrations, read_prompts
from oreal_megatron.data.records import read_records
from oreal_megatron.pass_rates import _check_decided
from oreal_megatron.types import Prompt

LINE = '{"question": "q", "gold_answer": "1"}\n'


def refused(path, content: bytes | str = b"", read=read_prompts) -> str:
    if content:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as caught:
        read(path)
    return str(caught.value)


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE.encode())
    assert [prompt.question for prompt in read_prompts(path)] == ["q"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(LINE.encode(), mtime=0), ("compressed with gzip", "gunzip --keep")),
        (LINE.encode("utf-16"), ("UTF-16 text", "iconv --from-code UTF-16")),
        (LINE.encode() + b"caf\xe9\n", ("p.jsonl:2: the line is not UTF-8", "iconv")),
        ("[1]\n[2]\n", ("p.jsonl:1: a JSON object is expected, not list",)),
        (json.dumps(json.loads(LINE), indent=2), ("goes over several lines", "jq --compact-output '.'")),
        ("question,gold_answer\nq,1\n", ("p.jsonl:1: not JSON", "Every line must be a JSON object")),
        ("[" * 100000, ("p.jsonl:1: not JSON", "Every line")),
    ],
)
@pytest.mark.parametrize("read", [read_prompts, lambda path: list(read_records(path))])
def test_file_of_another_format_is_refused_with_the_command_that_converts_it(tmp_path, content, words, read):
    message = refused(tmp_path / "p.jsonl", content, read)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1\x15\x04", ("a Parquet file", "oreal-data import")),
        (f"[{LINE.strip()}, {LINE.strip()}]", ("is one JSON array", "oreal-data import")),
        (json.dumps([json.loads(LINE)] * 2, indent=2), ("is one JSON array", "oreal-data import")),
    ],
)
def test_demonstrations_of_another_format_are_refused_with_the_command_that_converts_them(tmp_path, content, words):
    message = refused(tmp_path / "p.jsonl", content, read_demonstrations)
    assert all(word in message for word in words), message
    assert "is a directory" in (message := refused(tmp_path, read=read_demonstrations))
    assert f"oreal-data import {tmp_path}" in message


RECORDS = [{"question": f"q{i}", "gold_answer": f"{i}", "pass_rate": i / 4, "level": "hard"} for i in range(3)]


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


def arrow_directory(path):
    path.mkdir()
    with pyarrow.ipc.new_stream(
        str(path / "data-00000-of-00001.arrow"), pyarrow.Table.from_pylist(RECORDS).schema
    ) as file:
        file.write_table(pyarrow.Table.from_pylist(RECORDS))
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return path


def hub_directory(path):
    (path / "data").mkdir(parents=True)
    parquet(path / "data" / "train-00000-of-00001.parquet")
    (path / "data" / "test-00000-of-00001.parquet").write_bytes(b"not read")
    return path


def array(path):
    path.write_text(json.dumps(RECORDS, indent=1))
    return path


@pytest.mark.parametrize("write", [parquet, arrow_directory, hub_directory, array])
def test_prompts_are_read_from_files_and_directories_as_hubs_have_them(tmp_path, write):
    found = read_prompts(write(tmp_path / "train"), source="math")
    assert [(one.question, one.gold_answer, one.pass_rate, one.source) for one in found] == [
        (f"q{i}", f"{i}", i / 4, "math") for i in range(3)
    ]
    assert len({one.id for one in found}) == 3 and all(one.id.startswith("math/") for one in found)


def test_damaged_files_and_other_keys_are_named(tmp_path):
    assert "cannot be read" in refused(tmp_path / "p.parquet", b"PAR1\x15\x04")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GSM8K]), tmp_path / "g.parquet")
    message = refused(tmp_path / "g.parquet")
    assert "g.parquet:1: `gold_answer` is missing. Keys of the line: question, answer." in message
    assert "oreal-data import FILE --mapping gsm8k" in message


GSM8K = {"question": "How many?", "answer": "2+2=4\n#### 4"}
DAPO = {"prompt": [{"content": "How many?", "role": "user"}], "reward_model": {"ground_truth": "4", "style": "rule"}}
OTHER = {"meta": {"query": "How many?"}, "target": 4}


@pytest.mark.parametrize(
    ("record", "keys", "options"),
    [
        (GSM8K, "question, answer", "--mapping gsm8k"),
        (DAPO, "prompt, reward_model", "--mapping dapo_math_17k"),
        (OTHER, "meta, target", "--field question=meta.query --field gold_answer=target"),
    ],
)
def test_keys_of_public_data_sets_are_named_with_the_command_that_renames_them(tmp_path, record, keys, options):
    path = tmp_path / "p.jsonl"
    message = refused(path, json.dumps(record) + "\n")
    assert f"Keys of the line: {keys}." in message and f"oreal-data import FILE {options} --output" in message
    command = [str(path) if part == "FILE" else part for part in shlex.split(message.split("oreal-data ")[1])]
    command[-1] = str(tmp_path / command[-1])
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    [prompt] = read_prompts(tmp_path / "new.jsonl")
    assert (prompt.question, prompt.gold_answer) == ("How many?", "4")


def test_keys_that_no_name_fits_are_named(tmp_path):
    assert "Keys of the line: q, a. Name its keys question and gold_answer." in refused(
        tmp_path / "p.jsonl", '{"q": "1+1", "a": 2}\n'
    )
    message = refused(tmp_path / "d.jsonl", '{"question": "1+1", "output": "2"}\n', read_demonstrations)
    assert "oreal-data import FILE --field question=question --field response=output --output" in message


def test_empty_golds_are_counted_and_named_and_left_out_on_request(tmp_path, caplog, composed):
    path = tmp_path / "p.jsonl"
    path.write_text(LINE + '{"question": "r", "gold_answer": " "}\n{"question": "s", "gold_answer": null}\n')
    message = refused(path)
    assert "gold_answer is empty on 2 of 3 lines (2, 3)" in message and "data.empty_golds=skip" in message
    assert [prompt.question for prompt in read_prompts(path, empty_golds="skip")] == ["q"]
    assert "empty on 2 of 3 lines (2, 3); they are left out" in caplog.text
    assert parse_config(composed("data.empty_golds=skip")).data.empty_golds == "skip"


def test_repeated_questions_are_counted_and_other_golds_named(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    other = '{"question": "r", "gold_answer": "2"}\n'
    path.write_text(LINE + other + LINE + other.replace("2", "3"))
    assert len(read_prompts(path)) == 4
    assert "4 lines have 2 different questions (lines 1 and 3 are equal)" in caplog.text
    assert "1 questions have several gold answers" in caplog.text and "('2' on line 2, '3' on line 4)" in caplog.text


def test_prompts_that_the_verifier_never_decides_are_counted(caplog):
    prompts = [Prompt(id=id, question="q", gold_answer="Some sentence") for id in "abc"]
    _check_decided([], 3, is_empty=False)
    assert caplog.text == ""
    _check_decided(prompts[:1], 3, is_empty=False)
    assert "1 of 3 prompts have no pass rate" in caplog.text and "first: a" in caplog.text
    with pytest.raises(ValueError, match=r"3 of 3 prompts have no pass rate.*'Some sentence'"):
        _check_decided(prompts, 3, is_empty=True)


def test_half_of_a_surrogate_pair_is_refused_and_a_whole_one_is_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q \\ud83d\\ude00", "gold_answer": "1"}\n')
    assert read_prompts(path)[0].question == "q \U0001f600"
    path.write_text('{"question": "q", "gold_answer": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: it has half of a surrogate pair"):
        read_prompts(path)
