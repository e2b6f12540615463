"""Skill-based enhancement: problems of a pool that resemble those at which a policy fails, skill by skill.

The method is that of OREAL (arXiv 2502.06781): every problem has a core skill, and for problems that the policy fails
again and again, similar ones of the same skill are added to the data of its next fine-tuning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

from oreal_megatron.data.curation.report import Example, Report
from oreal_megatron.data.curation.similarity import most_similar
from oreal_megatron.data.curation.sources import find_files, num_records
from oreal_megatron.data.curation.text import question_key
from oreal_megatron.data.mapping import Source
from oreal_megatron.data.prompts import prompt_of, prompt_records
from oreal_megatron.files import json_line, write_parts_atomically

Record = dict[str, Any]
Tag = Callable[[Sequence[Record]], list[tuple[str, ...]]]
"""Records -> the skills of each; none where none is known."""
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(title, number of records) -> context with a function that is called for each record."""
SIGNIFICANCE = 0.05
"""Largest chance of a skill's number of failures, if its problems were as hard as all, at which the skill fails."""
_CANDIDATES = 16
"""Similar problems that are tagged for each that is wanted."""


class _Chosen(NamedTuple):
    """A problem of the pool that is written."""

    position: int
    skill: str
    similar_to: str
    """File and number of the failed problem."""
    similarity: float


def tags_at(place: Source) -> Tag:
    """Returns a function that reads the skills at a place of a record: a text, or a list of texts."""

    def tag(records: Sequence[Record]) -> list[tuple[str, ...]]:
        found = [place.value(record) for record in records]
        return [
            tuple(
                dict.fromkeys(
                    skill_name(str(one))
                    for one in (value if isinstance(value, list) else [value])
                    if one not in (None, "")
                )
            )
            for value in found
        ]

    return tag


def skill_name(text: str) -> str:
    """Returns the name of a skill in lower case, with single spaces."""
    return " ".join(text.casefold().split())


def enhance(
    path: Path,
    pool: Path,
    output: Path,
    tag: Tag,
    *,
    failing: float,
    num_similar: int,
    progress: Progress,
) -> Report:
    """Writes problems of the pool that are similar to failed problems of failing skills, and where they come from.

    A skill fails if more of its problems fail than of all, beyond chance (one-sided binomial test). Each failed problem
    of such a skill gets the most similar problems of the pool with the skill. Questions of `path` are not written.

    path: prompts with pass rates. failing: largest pass rate of a failed problem. num_similar: problems for each failed
    one, at most. progress: shows the reading of both files.

    Raises:
        ValueError: there is no pass rate, no skill fails, or the pool has no problem of a failing skill.
    """
    report = Report()
    total = num_records([file for source in (path, pool) for file in find_files(source, None)])
    with progress("read", total) as advance:
        rated, known = _rated(path, report, advance)
        pool_records = _pool(pool, known, report, advance)
    skills = tag([record for _, record, _ in rated])
    failed = [pass_rate <= failing for _, _, pass_rate in rated]
    weak = _failing_skills(skills, failed, path, report)
    queries = [
        (where, record, set(own) & weak)
        for (where, record, _), own, is_failed in zip(rated, skills, failed, strict=True)
        if is_failed and set(own) & weak
    ]
    chosen = _chosen(queries, pool_records, tag, num_similar, report)
    if not chosen:
        raise ValueError(
            f"{pool}: it has no problem of the failing skills {', '.join(sorted(weak))} that is similar to a failed "
            "one. Give another pool."
        )
    write_parts_atomically(output, _lines(pool_records, chosen, report))
    return report


def _rated(
    path: Path, report: Report, advance: Callable[[], None]
) -> tuple[list[tuple[str, Record, float]], set[bytes]]:
    """Returns the records with a pass rate, and the keys of all questions."""
    rated, known = [], set()
    for where, record in prompt_records(path):
        advance()
        prompt = prompt_of(record, where)
        known.add(question_key(prompt.question))
        if prompt.pass_rate is None:
            report.counts["problem without a pass rate"] += 1
        else:
            rated.append((where, record, prompt.pass_rate))
    if not rated:
        raise ValueError(f"{path}: no record has a pass_rate. oreal-data pass-rates writes them.")
    return rated, known


def _failing_skills(skills: Sequence[tuple[str, ...]], failed: Sequence[bool], path: Path, report: Report) -> set[str]:
    """Returns the skills that fail, and reports them with their numbers."""
    totals = Counter(skill for own in skills for skill in own)
    failures = Counter(skill for own, is_failed in zip(skills, failed, strict=True) if is_failed for skill in own)
    overall = sum(failed) / len(failed)
    report.counts["failed problem"] = sum(failed)
    report.counts["problem without a skill"] = sum(not own for own in skills)
    chances = {
        skill: binomtest(count, totals[skill], overall, alternative="greater").pvalue
        for skill, count in failures.items()
    }
    weak = sorted((skill for skill, p in chances.items() if p <= SIGNIFICANCE), key=lambda skill: chances[skill])
    report.tables["failing skill: failed problems"] = Counter({skill: failures[skill] for skill in weak})
    report.examples += [
        Example("failing skill", skill, f"{failures[skill]} of {totals[skill]} problems fail, {overall:.0%} of all")
        for skill in weak
    ]
    if not weak:
        raise ValueError(
            f"{path}: none of {len(totals)} skills fails more than all problems do ({overall:.0%}), beyond chance. "
            "Raise --failing, give more problems, or select hard ones with oreal-data select."
        )
    return set(weak)


def _pool(pool: Path, known: set[bytes], report: Report, advance: Callable[[], None]) -> list[tuple[str, Record]]:
    """Returns the problems of the pool, each once, without the known questions."""
    found = []
    seen = set(known)
    for where, record in prompt_records(pool):
        advance()
        key = question_key(prompt_of(record, where).question)
        if key in seen:
            report.counts["problem of the pool that is known"] += 1
        else:
            seen.add(key)
            found.append((where, record))
    return found


def _chosen(
    queries: Sequence[tuple[str, Record, set[str]]],
    pool: Sequence[tuple[str, Record]],
    tag: Tag,
    num_similar: int,
    report: Report,
) -> list[_Chosen]:
    """Returns the problems to write. queries: place, record and failing skills of each failed problem."""
    ranked = most_similar(
        [record["question"] for _, record, _ in queries],
        [record["question"] for _, record in pool],
        num_similar * _CANDIDATES,
    )
    candidates = sorted({index for own in ranked for index, _ in own})
    skills = dict(zip(candidates, tag([pool[index][1] for index in candidates]), strict=True))
    chosen: dict[int, _Chosen] = {}
    for (where, _, wanted), own in zip(queries, ranked, strict=True):
        num_found = 0
        for index, similarity in own:
            shared = sorted(wanted & set(skills[index]))
            if shared and num_found < num_similar:
                num_found += 1
                chosen.setdefault(index, _Chosen(index, shared[0], where, similarity))
        report.counts["failed problem with fewer similar ones"] += num_found < num_similar
    return [chosen[index] for index in sorted(chosen)]


def _lines(pool: Sequence[tuple[str, Record]], chosen: Sequence[_Chosen], report: Report) -> Iterator[bytes]:
    written = Counter(one.skill for one in chosen)
    report.tables["skill: written problems"] = Counter(dict(written.most_common()))
    for one in chosen:
        where, record = pool[one.position]
        report.counts["written"] += 1
        similarity = round(one.similarity, 4)
        yield json_line(
            {**record, "skill": one.skill, "similar_to": one.similar_to, "similarity": similarity, "from": where}
        )
