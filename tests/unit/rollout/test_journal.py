"""The journal: what is on the disk is reused, what is not is generated, and never another unit's rollouts."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from oreal_megatron import files
from oreal_megatron.config import SamplingConfig, UndecidedConfig
from oreal_megatron.files import json_line
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.stopping import Stopped, StopRequest, TooManyUndecided
from oreal_megatron.types import (
    Completion,
    FinishReason,
    Grade,
    GradedRollout,
    Prompt,
    Rollout,
    Verdict,
    WeightSpan,
    undecided,
)

SAMPLING = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=4)
PROMPTS = [Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(5)]


class Renderer:
    def token_ids(self, prompt):
        return (1, int(prompt.id))

    def response_text(self, token_ids):
        return " ".join(map(str, token_ids))


class Engine:
    """Three requests a unit; counts what it is asked for."""

    def __init__(self, fails_after=None):
        self.weight_version = 0
        self.generated = 0
        self.fails_after = fails_after

    def units(self, requests):
        return [list(range(len(requests)))[start : start + 3] for start in range(0, len(requests), 3)]

    def generate(self, units, sampling, is_enough=None):
        for index, requests in enumerate(units):
            if self.generated == self.fails_after:
                raise KeyboardInterrupt
            self.generated += 1
            yield (
                index,
                [
                    Completion(
                        token_ids=(r.seed % 97, self.weight_version),
                        logprobs=(-0.1, -1 / 3),
                        finish_reason=FinishReason.STOP,
                        weight_spans=(WeightSpan(version=self.weight_version, start=0, end=2),),
                    )
                    for r in requests
                ],
            )


def content(groups):
    """Every field of the rollouts, as on the disk."""
    return [[json_line(graded.to_json()) for graded in group] for group in groups]


def grade(requests):
    return [Grade(verdict=Verdict.CORRECT, reason="", stage="rules") for _ in requests]


@pytest.fixture
def run(tmp_path, single_process):
    """Samples 2 x 5 rollouts (4 units) with an engine, in a new process' journal of the same directory."""

    def sample(engine, prompts=PROMPTS, stop=None, batch_name="step_000003"):
        journal = RolloutJournal(tmp_path / "journal", single_process)
        sampler = Sampler(
            engine, Renderer(), grade, journal, single_process, stop or StopRequest(), max_sequence_length=64,
            undecided=None,
        )  # fmt: skip
        try:
            return sampler.sample(
                prompts, batch_name=batch_name, num_samples=2, sampling=SAMPLING, seed_of=rollout_seeds(0, "train", 3)
            ).groups
        finally:
            journal.close()

    return sample


def test_only_missing_units_are_generated_again(run, tmp_path):
    whole = content(run(Engine(), batch_name="step_000009"))
    killed = Engine(fails_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    again = Engine()
    assert content(run(again)) == whole
    assert (killed.generated, again.generated) == (3, 1)
    assert content(run(Engine(fails_after=0))) == whole


def test_a_half_written_line_is_generated_again_and_cut_off(run, tmp_path):
    whole = content(run(Engine()))
    path = tmp_path / "journal" / "step_000003.replica_0.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines[:-40])
    again = Engine()
    assert content(run(again)) == whole and again.generated == 1
    assert path.read_bytes() == lines


def test_a_damaged_line_is_generated_again(run, tmp_path):
    whole = content(run(Engine()))
    path = tmp_path / "journal" / "step_000003.replica_0.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0" * 50, *lines[2:]]))
    again = Engine()
    assert content(run(again)) == whole and again.generated == 1


def test_other_weights_or_prompts_never_reuse(run):
    run(Engine())
    newer = Engine()
    newer.weight_version = 1
    assert run(newer)[0][0].rollout.weight_spans[0].version == 1 and newer.generated == 4
    changed = Engine()
    run(changed, [replace(PROMPTS[0], gold_answer="7"), *PROMPTS[1:]])
    assert changed.generated == 1  # the unit with that prompt


def test_a_stop_keeps_what_is_finished(run):
    stop, engine = StopRequest(), Engine()

    class Signalled(Engine):
        def generate(self, units, sampling, is_enough=None):
            for item in engine.generate(units, sampling):
                yield item
                stop.signal = "SIGUSR1" if engine.generated == 2 else None

    with pytest.raises(Stopped):
        run(Signalled(), stop=stop)
    again = Engine()
    run(again)
    assert again.generated == 4 - engine.generated < 4


def test_logprobs_come_back_to_the_last_bit(run):
    first = run(Engine())[0][0].rollout.logprobs
    again = run(Engine(fails_after=0))[0][0].rollout.logprobs
    assert again.dtype == np.float32 and again.tobytes() == first.tobytes() == np.float32([-0.1, -1 / 3]).tobytes()


def test_journal_of_an_earlier_version_is_reused(run, tmp_path):
    """It has log-probabilities with the digits of a double, and spaces between the items."""
    whole = content(run(Engine()))
    path = tmp_path / "journal" / "step_000003.replica_0.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for rollout in record["rollouts"]:
            rollout["logprobs"] = np.float32(rollout["logprobs"]).tolist()
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert content(run(Engine(fails_after=0))) == whole


def test_earlier_steps_are_dropped(run, tmp_path, single_process):
    for step in (3, 4, 5):
        run(Engine(), batch_name=f"step_{step:06d}")
    run(Engine(), batch_name="evaluation_000004")
    run(Engine(), batch_name="pass_rates_000000")
    journal = RolloutJournal(tmp_path / "journal", single_process)
    journal.drop(before_step=5)
    names = {path.name for path in (tmp_path / "journal").iterdir()}
    assert names == {"step_000005.replica_0.jsonl", "pass_rates_000000.replica_0.jsonl"}
    journal.forget("pass_rates_*")
    assert [json.loads(line)["unit"] for p in (tmp_path / "journal").iterdir() for line in p.open()]
    assert {path.name for path in (tmp_path / "journal").iterdir()} == {"step_000005.replica_0.jsonl"}


@pytest.fixture
def checked(tmp_path, single_process):
    """Samples as `run`, and checks the share of UNDECIDED responses as a step does."""

    def sample(engine, grader, limits):
        journal = RolloutJournal(tmp_path / "journal", single_process)
        sampler = Sampler(
            engine, Renderer(), grader, journal, single_process, StopRequest(), max_sequence_length=64,
            undecided=limits,
        )  # fmt: skip
        try:
            groups = sampler.sample(
                PROMPTS, batch_name="step_000003", num_samples=2, sampling=SAMPLING,
                seed_of=rollout_seeds(0, "train", 3),
            ).groups  # fmt: skip
            responses = [graded for group in groups for graded in group]
            sampler.check_undecided("step 3", undecided(responses), len(responses), ["step_000003"])
        finally:
            journal.close()
        return [graded.verdict for graded in responses]

    return sample


def test_too_many_undecided_responses_end_the_run_and_are_graded_again(checked, caplog):
    """A judge is down for a while: nothing is trained on the rest, and no response is generated twice."""
    limits = UndecidedConfig(warn=0.1, stop=0.5)
    judge = SimpleNamespace(is_down=True)

    def grader(requests):
        verdict = Verdict.UNDECIDED if judge.is_down else Verdict.CORRECT
        return [Grade(verdict=verdict, reason="the judge is down", stage="judge") for _ in requests]

    engine = Engine()
    message = r"step 3: 10 of 10 .*rollout.undecided.stop = 0.5 .*the judge is down"
    for _ in range(2):
        with pytest.raises(TooManyUndecided, match=message):
            checked(engine, grader, limits)
    judge.is_down = False
    assert checked(engine, grader, limits) == [Verdict.CORRECT] * 10
    assert engine.generated == 4 and not caplog.text


@pytest.mark.parametrize(("limits", "is_said"), [(UndecidedConfig(warn=0.1, stop=0.5), True), (None, False)])
def test_some_undecided_responses_are_warned_of_and_keep_their_verdict(checked, caplog, limits, is_said):
    """A step that went on has the same verdicts when it is repeated after a kill, whatever the verifier says then."""

    def grader(requests):
        verdicts = [Verdict.UNDECIDED if "0" in r.question else Verdict.CORRECT for r in requests]
        return [Grade(verdict=verdict, reason="no number", stage="rules") for verdict in verdicts]

    found = checked(Engine(), grader, limits)
    assert found.count(Verdict.UNDECIDED) == 2
    assert ("step 3: 2 of 10 responses are UNDECIDED, more than rollout.undecided.warn = 0.1" in caplog.text) == is_said
    assert checked(Engine(), grade, limits) == found


def test_unit_that_was_generated_again_is_read_in_whatever_file_it_is(tmp_path, single_process):
    def unit(version):
        spans = (WeightSpan(version=version, start=0, end=1),)
        rollout = Rollout(
            prompt=PROMPTS[0], sample_index=0, prompt_ids=(1,), response_ids=np.array([2], np.int32),
            logprobs=np.zeros(1, np.float32), text="2", finish_reason=FinishReason.STOP, weight_spans=spans,
        )  # fmt: skip
        return [GradedRollout(rollout=rollout, grade=grade([None])[0])]

    for replica, version in ((1, 0), (0, 3)):  # the later file in the order of names is the older one
        groups = SimpleNamespace(is_main=True, data_rank=replica)
        journal = RolloutJournal(tmp_path, groups)
        journal.append("step_000003", "key", unit(version))
        journal.close()
    (found,) = RolloutJournal(tmp_path, single_process).read("step_000003")["key"]
    assert found.rollout.weight_spans[0].version == 3


@pytest.mark.parametrize("end", [b"", b"half", b"half" * 40_000])
def test_opened_log_ends_with_a_whole_line(tmp_path, end):
    path = tmp_path / "log.jsonl"
    whole = (b"x" * 99 + b"\n") * 5_000
    path.write_bytes(whole + end)
    opened = files.open_log(path)
    opened.close()
    assert path.read_bytes() == whole
    path.write_bytes(end)
    files.open_log(path).close()
    assert path.read_bytes() == b""


def test_batches_that_take_turns_do_not_read_their_files_again(tmp_path, single_process):
    """The bytes read stay those of a block a change of the file, however large the files are."""
    journal = RolloutJournal(tmp_path, single_process)
    for batch in ("step_000001", "step_000002"):
        (tmp_path / f"{batch}.replica_0.jsonl").write_bytes(b"x" * 40_000_000 + b"\n")
    tracemalloc.start()
    journal.append("step_000001", "a", [])
    journal.append("step_000002", "b", [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    journal.close()
    assert peak < 1_000_000


def test_units_of_several_threads_are_all_journalled(tmp_path, single_process):
    journal = RolloutJournal(tmp_path, single_process)
    with ThreadPoolExecutor(4) as pool:
        for appended in [pool.submit(journal.append, f"step_{n % 2:06d}", f"{n}", []) for n in range(200)]:
            appended.result()
    journal.close()
    assert [len(journal.read(f"step_{step:06d}")) for step in range(2)] == [100, 100]
