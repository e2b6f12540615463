"""Import of public data sets, as small files in their shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from oreal_megatron.cli.data import main
from oreal_megatron.data.mapping import presets
from oreal_megatron.data.prompts import read_prompts

INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)


def turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "assistant", "ground_truth": {"value": answer}}]


def dapo(question: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": INSTRUCTION.format(question), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


def numina(question: str, answer: str) -> dict[str, Any]:
    return {
        "problem": question,
        "solution": f"We count. It is ${answer}$.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "olympiads",
        "synthetic": False,
    }


def openr1(question: str, answer: str) -> dict[str, Any]:
    more = {"uuid": "1", "generations": ["<think>..."], "correctness_math_verify": [True], "messages": []}
    return {**numina(question, answer), **more}


# Preset -> a record of the data set from a question and its answer.
SHAPES = {
    "oreal_rl_prompts": lambda q, a: {"question": q, "gold_answer": a, "pass_rate": 0.25},
    "dapo_math_17k": dapo,
    "deepscaler": lambda q, a: {"problem": q, "answer": a, "solution": f"It is $\\boxed{{{a}}}$."},
    "numina_math": numina,
    "numina_math_cot": lambda q, a: {
        "source": "aops_forum",
        "problem": q,
        "solution": f"We find $\\boxed{{{a}}}$.",
        "messages": [{"role": "user", "content": q}],
    },
    "openr1_math": openr1,
    "orz": turns,
    "gsm8k": lambda q, a: {"question": q, "answer": f"2 and 2 are <<2+2=4>>4.\n#### {a}"},
    "math": lambda q, a: {"problem": q, "level": "Level 2", "type": "Algebra", "solution": f"So $\\boxed{{{a}}}$."},
    "math_500": lambda q, a: {
        "problem": q,
        "solution": f"So $\\boxed{{{a}}}$.",
        "answer": a,
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/algebra/1.json",
    },
}
PAIRS = [("How many are 2 and 2?", "4"), ("What is half of 7?", "\\frac{7}{2}")]


def run(*arguments: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == status


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    run(*arguments, status=1)
    return capsys.readouterr().err


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_arrow(path: Path, records: list[Any], *, stream: bool = True) -> None:
    table = pyarrow.Table.from_pylist(records)
    open_new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, open_new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


def imported(source: Path, output: Path, *options: object) -> list[tuple[str, str]]:
    run("import", source, "--output", output, *options)
    return [(prompt.question, prompt.gold_answer) for prompt in read_prompts(output)]


def test_every_preset_has_a_shape():
    assert SHAPES.keys() == presets().keys()


@pytest.mark.parametrize("preset", SHAPES)
def test_public_data_set_is_recognized_and_imported(preset, tmp_path, capsys):
    records = [SHAPES[preset](*pair) for pair in PAIRS]
    assert imported(write_lines(tmp_path / "a.jsonl", records), tmp_path / "out.jsonl") == PAIRS
    assert f"as {presets()[preset].title}" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps(records, indent=2))
    assert imported(tmp_path / "a.json", tmp_path / "out.jsonl") == PAIRS
    if preset != "orz":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
        assert imported(tmp_path / "a.parquet", tmp_path / "out.jsonl") == PAIRS


def test_pass_rates_and_kept_keys_are_imported(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [SHAPES["oreal_rl_prompts"]("q", "1")])
    imported(source, tmp_path / "out.jsonl")
    assert read_prompts(tmp_path / "out.jsonl")[0].pass_rate == 0.25
    imported(write_lines(tmp_path / "a.jsonl", [numina("q", "1")]), tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["problem_type"] == "Algebra"


def test_records_without_an_answer_are_counted_and_left_out(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [numina("p", "proof"), numina("q", "notfound"), numina("r", "3")])
    run("import", source, "--output", tmp_path / "out.jsonl", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"left out, no gold_answer": 2, "written": 1}
    assert report["examples"][0]["where"] == f"{source}:1"


def test_directories_of_data_sets_are_read(tmp_path):
    records = [SHAPES["gsm8k"](*pair) for pair in PAIRS]
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    write_arrow(saved / "data-00000-of-00002.arrow", records[:1])
    write_arrow(saved / "data-00001-of-00002.arrow", records[1:], stream=False)
    files = [{"filename": f"data-0000{index}-of-00002.arrow"} for index in range(2)]
    (saved / "state.json").write_text(json.dumps({"_data_files": files}))
    assert imported(saved, tmp_path / "out.jsonl") == PAIRS
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert imported(saved.parent, tmp_path / "out.jsonl") == PAIRS

    cloned = tmp_path / "cloned" / "main"
    cloned.mkdir(parents=True)
    for split, part in (("train", records), ("test", records[:1])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), cloned / f"{split}-00000-of-00001.parquet")
    assert imported(cloned.parent, tmp_path / "out.jsonl") == PAIRS
    assert imported(cloned.parent, tmp_path / "out.jsonl", "--split", "test") == PAIRS[:1]


def test_directories_with_a_file_for_each_problem_are_read_together(tmp_path):
    for index, subject in enumerate(("algebra", "geometry")):
        (tmp_path / "train" / subject).mkdir(parents=True)
        record = SHAPES["math"](*PAIRS[index])
        (tmp_path / "train" / subject / "1.json").write_text(json.dumps(record, indent=4))
    sources = sorted((tmp_path / "train").iterdir())
    run("import", *sources, "--output", tmp_path / "out.jsonl")
    assert [(prompt.question, prompt.gold_answer) for prompt in read_prompts(tmp_path / "out.jsonl")] == PAIRS


def test_conversation_with_turns_by_number_is_recognized(tmp_path):
    records = [dict(zip("01", turns(*pair), strict=True)) for pair in PAIRS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert imported(tmp_path / "a.parquet", tmp_path / "out.jsonl") == PAIRS


def test_directory_of_several_data_sets_is_refused_with_their_names(tmp_path, capsys):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", [SHAPES["gsm8k"]("q", "1")])
    message = refused(capsys, "import", tmp_path, "--output", tmp_path / "out.jsonl")
    assert f"Name those that you want: {tmp_path}/main, {tmp_path}/socratic" in message
    assert "its splits are train" in refused(
        capsys, "import", tmp_path / "main", "--split", "test", "--output", tmp_path / "out.jsonl"
    )


def test_unknown_shape_is_refused_with_its_keys_and_the_options_that_fit(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [{"meta": {"query": "q"}, "target": 4}])
    message = refused(capsys, "import", source, "--output", tmp_path / "out.jsonl")
    assert "Keys of the first record: meta, target." in message
    assert "--field question=meta.query --field gold_answer=target" in message
    options = ("--field", "question=meta.query", "--field", "gold_answer=target")
    assert imported(source, tmp_path / "out.jsonl", *options) == [("q", "4")]
    source = write_lines(tmp_path / "a.jsonl", [{"x": 1, "y": 2}])
    assert "Keys of the first record: x, y." in refused(capsys, "import", source, "--output", tmp_path / "o.jsonl")


def test_mapping_of_another_data_set_is_refused_with_the_fitting_preset(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [SHAPES["math"]("q", "1")])
    output = tmp_path / "out.jsonl"
    message = refused(capsys, "import", source, "--mapping", "gsm8k", "--output", output)
    assert "none of 1 records has a text at each of question = question, gold_answer = answer" in message
    assert "--mapping math." in message
    assert not output.exists() and not list(tmp_path.glob("*.partial"))
    assert "gsm8k, math" in refused(capsys, "import", source, "--mapping", "gsm8", "--output", output)


def test_mapping_of_a_file_is_used_and_its_faults_are_named(tmp_path, capsys):
    mapping = tmp_path / "own.yaml"
    mapping.write_text("question: {path: q, prefix: 'Task:'}\ngold_answer: {path: a, final_answer: true}\n")
    source = write_lines(tmp_path / "a.jsonl", [{"q": "Task: add", "a": "1+1 = \\boxed{2}"}])
    assert imported(source, tmp_path / "out.jsonl", "--mapping", mapping) == [("add", "2")]
    mapping.write_text("question: 'q['\nanswer: a\n")
    message = refused(capsys, "import", source, "--mapping", mapping, "--output", tmp_path / "out.jsonl")
    assert f"{mapping}.question.path" in message and "JMESPath" in message and f"{mapping}.answer" in message


def test_demonstrations_are_imported(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"problem": "1+1", "solution": "It is 2."}])
    fields = ("--field", "question=problem", "--field", "response=solution")
    run("import", source, "--output", tmp_path / "out.jsonl", *fields)
    [demonstration] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (demonstration["question"], demonstration["response"]) == ("1+1", "It is 2.")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read: "),
        ("a.arrow", b"\xff\xff\xff\xff and no more", "a.arrow: cannot be read: "),
        ("a.json", b"[1, 2", "a.json:1: not JSON"),
        ("a.jsonl", b"", "a.jsonl: it has no records"),
        ("a.jsonl", b'{"question": "q", "gold_answer": "1", "pass_rate": 7}', "a.jsonl:1: pass_rate is 7"),
        ("state.json", b"{}", "state.json: it has no list '_data_files'"),
        ("dataset_dict.json", b"no JSON", "dataset_dict.json: it has no list 'splits'"),
        ("notes.txt", b"notes", "no .parquet, .arrow, .jsonl, .json files in it"),
    ],
)
def test_damaged_source_is_refused_with_its_name(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    source = tmp_path if name in ("state.json", "dataset_dict.json", "notes.txt") else tmp_path / name
    message = refused(capsys, "import", source, "--output", tmp_path / "out.jsonl")
    assert words in message and not (tmp_path / "out.jsonl").exists()


def test_expression_that_a_record_does_not_fit_is_named(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [{"q": "q", "a": 1}])
    fields = ("--field", "question=q", "--field", "gold_answer=length(b)")
    message = refused(capsys, "import", source, *fields, "--output", tmp_path / "out.jsonl")
    assert "none of 1 records has a text at each of question = q, gold_answer = length(b)" in message
