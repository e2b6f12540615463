"""Skill-based enhancement by the command: a planted weak skill, by a key and named by a served model."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oreal_megatron.cli.data import main
from oreal_megatron.data.curation.similarity import most_similar
from oreal_megatron.data.curation.skills import tags_at
from oreal_megatron.data.curation.text import tokens
from oreal_megatron.data.mapping import Source
from tests.unit.data.curation.test_curation import report
from tests.unit.data.curation.test_selection import lines
from tests.unit.verifier.judge_server import JudgeServer, completion

WORDS = {
    "modular arithmetic": "What is the remainder when {a}^{b} is divided by {c}?",
    "similar triangles": "Triangles ABC and DEF are similar, AB={a}, DE={b} and BC={c}. Find EF.",
    "linear equations": "Solve {a}x + {b} = {c} for x.",
    "probability": "A bag has {a} red, {b} blue and {c} green balls. What is the probability of a red ball?",
}
WEAK = "modular arithmetic"


def problem(skill: str, rng: random.Random) -> dict[str, Any]:
    question = WORDS[skill].format(a=rng.randrange(2, 99), b=rng.randrange(2, 99), c=rng.randrange(2, 99))
    return {"question": question, "gold_answer": "1", "skills": [skill.title(), "algebra"]}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """200 rated problems, of which those of the weak skill mostly fail, and a pool with the skill in a tenth."""
    rng = random.Random(0)
    rated, pool = tmp_path / "rated.jsonl", tmp_path / "pool.jsonl"
    records = [problem(list(WORDS)[i % 4], rng) for i in range(200)]
    for i, record in enumerate(records):
        if i < 190:
            is_failed = rng.random() < (0.8 if i % 4 == 0 else 0.2)
            record["pass_rate"] = rng.choice([0.0, 0.125, 0.25]) if is_failed else rng.choice([0.5, 0.75, 1.0])
    others = [problem(WEAK if i % 10 == 0 else rng.choice(list(WORDS)[1:]), rng) for i in range(1000)]
    rated.write_text("".join(json.dumps(record) + "\n" for record in records))
    pool.write_text("".join(json.dumps(record) + "\n" for record in [*others, *records[:20]]))
    return rated, pool


def test_a_planted_weak_skill_is_found_and_over_represented(files, tmp_path, capsys):
    rated, pool = files
    output = tmp_path / "more.jsonl"
    found = report(capsys, "skills", rated, "--pool", pool, "--tags", "skills", "--similar", "2", "--output", output)
    failures = [r for r in lines(rated) if r.get("pass_rate", 1) <= 0.25]
    weak_ones = [r for r in failures if r["skills"][0] == "Modular Arithmetic"]
    # `algebra`, which all problems have, fails as often as all do.
    assert found["tables"]["failing skill: failed problems"] == {WEAK: len(weak_ones)}
    assert found["counts"]["failed problem"] == len(failures)
    assert found["counts"]["problem without a pass rate"] == 10
    assert found["counts"]["problem of the pool that is known"] >= 20
    written = lines(output)
    assert len(written) == found["counts"]["written"] > 20
    # A tenth of the pool has the skill, and all that is written.
    assert Counter(r["skills"][0] for r in written) == {"Modular Arithmetic": len(written)}
    known = {f"{rated}:{i + 1}": r for i, r in enumerate(lines(rated))}
    by_place = {f"{pool}:{i + 1}": r for i, r in enumerate(lines(pool))}
    for record in written:
        assert known[record["similar_to"]] in weak_ones and record["skill"] == WEAK
        assert 0 < record["similarity"] <= 1
        assert by_place[record["from"]] == {key: record[key] for key in ("question", "gold_answer", "skills")}
    assert not {r["question"] for r in written} & {r["question"] for r in known.values()}


def names_the_skill(body: dict[str, Any]) -> tuple[int, str]:
    question = body["messages"][1]["content"]
    skill = next(skill for skill, words in WORDS.items() if words.split("{")[0] in question)
    return completion(json.dumps({"skill": f" {skill.upper()} "}))


def test_a_served_model_names_skills_once_each_and_a_failed_command_goes_on(files, tmp_path, capsys):
    rated, pool = files
    output, cache = tmp_path / "more.jsonl", tmp_path / "skills.jsonl"

    def fails_at_the_second_skill(body: dict[str, Any]) -> tuple[int, str]:
        is_weak = WORDS[WEAK].split("{")[0] in body["messages"][1]["content"]
        return names_the_skill(body) if is_weak else (400, "no")

    with JudgeServer(fails_at_the_second_skill) as server:
        command = ["skills", rated, "--pool", pool, "--endpoint", server.url, "--model", "m", "--output", output,
                   "--cache", cache]  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, command)))
        said = capsys.readouterr().err
        assert ended.value.code == 1 and "have no skill from m (" in said and str(cache) in said
        assert not output.exists()
        kept = len(lines(cache))
        # After five failures in a row the endpoint is left alone.
        assert 0 < kept <= len({r["question"] for r in lines(rated)[:190:4]})
        server.behaviour = names_the_skill
        server.requests.clear()
        found = report(capsys, *command)
        asked = [body["messages"][1]["content"] for body in server.requests]
        assert len(asked) == len(set(asked)) == len(lines(cache)) - kept
        assert found["tables"]["skill: written problems"] == {WEAK: len(lines(output))} and lines(output)
        server.requests.clear()
        assert report(capsys, *command) == found and not server.requests
        assert names_request(server, command, tmp_path)["properties"]["skill"]["enum"] == [WEAK, "geometry"]


def names_request(server: JudgeServer, command: list[Any], tmp_path: Path) -> dict[str, Any]:
    """The schema of the reply where skills to choose from are given."""
    (tmp_path / "names").write_text("Modular  arithmetic\ngeometry\n")
    server.behaviour = lambda body: completion('{"skill": "modular arithmetic"}')
    with pytest.raises(SystemExit):  # all problems have one skill, which fails no more than all
        main([*map(str, command), "--names", str(tmp_path / "names")])
    return server.requests[0]["response_format"]["json_schema"]["schema"]


def test_without_a_failing_skill_or_pass_rates_it_is_said(files, tmp_path, capsys):
    rated, pool = files
    for options, message in (
        (["--tags", "skills[1]"], "none of 1 skills fails more than all problems do"),
        (["--tags", "nothing"], "none of 0 skills fails more"),
        (["--endpoint", "http://x"], "--endpoint is given without --model"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["skills", str(rated), "--pool", str(pool), "--output", str(tmp_path / "o"), *options])
        assert ended.value.code == 1 and message in capsys.readouterr().err
    unrated = tmp_path / "unrated.jsonl"
    unrated.write_text('{"question": "q", "gold_answer": "1"}\n')
    with pytest.raises(SystemExit):
        main(["skills", str(unrated), "--pool", str(pool), "--output", str(tmp_path / "o"), "--tags", "skills"])
    assert "unrated.jsonl: no record has a pass_rate. oreal-data pass-rates writes them" in capsys.readouterr().err


def test_similarity_against_dense_vectors():
    texts = ["solve 2x + 3 = 7", "the remainder of 7 by 3", "a red ball", "solve x + 3 = 9 for x", ""]
    queries = ["solve 3x + 3 = 7", "remainder of 9 by 7", "nothing alike"]
    everything = [tokens(text) for text in [*queries, *texts]]
    vocabulary = sorted({token for one in everything for token in one})
    counts = np.array([[one.count(token) for token in vocabulary] for one in everything], float)
    idf = np.log((1 + len(everything)) / (1 + (counts > 0).sum(0))) + 1
    vectors = counts * idf
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors[:3] @ vectors[3:].T
    for own, wanted in zip(most_similar(queries, texts, 2), cosines, strict=True):
        order = [i for i in np.argsort(-wanted, kind="stable") if wanted[i] > 0][:2]
        assert [index for index, _ in own] == order
        assert [value for _, value in own] == pytest.approx([wanted[i] for i in order])


def test_similarity_in_blocks_takes_the_first_of_equally_similar_texts(monkeypatch):
    texts = [f"sum of {word} numbers" for word in ("odd", "even", "odd", "prime", "odd", "even")] * 5
    queries = ["sum of odd numbers", "even numbers", "prime"] * 3
    whole = most_similar(queries, texts, 4)
    assert [index for index, _ in whole[0]] == [0, 2, 4, 6]
    monkeypatch.setattr("oreal_megatron.data.curation.similarity._BLOCK", 2 * len(texts))
    assert most_similar(queries, texts, 4) == whole


def test_a_skill_that_a_record_names_twice_counts_once():
    assert tags_at(Source(path="skills"))([{"skills": ["Algebra", "algebra ", "Sets"]}]) == [("algebra", "sets")]
