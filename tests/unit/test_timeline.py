"""The timeline: what is recorded of phases, requests and servers, and how it becomes one trace."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import replace

import pytest

from oreal_megatron.distributed.profiling import gather_timeline
from oreal_megatron.distributed.step_timer import StepTimer
from oreal_megatron.timeline import Event, Recording, Timeline, trace
from tests.fake_sglang import fake_servers
from tests.unit.rollout.test_ahead import Trainer
from tests.unit.rollout.test_journal import grade
from tests.unit.servers.conftest import generate, on_loop, requests_of, until, update

NUM_REQUESTS = 12


@pytest.fixture
def fakes(tmp_path):
    with fake_servers(tmp_path) as opened:
        yield opened


def recording(*events, rank=0, host="a", wall_offset=0.0):
    return Recording(rank=rank, host=host, wall_offset=wall_offset, events=events, urls={0: "http://s"})


def request(start, end, name="r"):
    return Event(kind="request", name=name, start=start, end=end, server=0)


def slices(built, kind):
    return [event for event in built["traceEvents"] if event["ph"] == "X" and event["cat"] == kind]


def assert_nested(built):
    """Slices of a row lie within each other or beside each other, as viewers require."""
    rows = defaultdict(list)
    for event in built["traceEvents"]:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append((event["ts"], -event["dur"]))
    for row in rows.values():
        ends = []
        for start, minus_duration in sorted(row):
            while ends and ends[-1] <= start + 1e-3:
                ends.pop()
            assert not ends or start - minus_duration <= ends[-1] + 1e-3
            ends.append(start - minus_duration)


def test_requests_that_overlap_have_rows_of_their_own_and_the_counter_counts_them():
    spans = [(0.0, 4.0), (1.0, 2.0), (2.0, 3.0), (2.5, 5.0), (6.0, 7.0)]
    built = trace([recording(*(request(*span) for span in spans))], origin=0.0)
    rows = {(event["ts"] / 1e6, event["args"]["seconds"]): event["tid"] for event in slices(built, "request")}
    assert rows == {(0.0, 4.0): 1, (1.0, 1.0): 2, (2.0, 1.0): 2, (2.5, 2.5): 3, (6.0, 1.0): 1}
    counts = [(e["ts"] / 1e6, e["args"]["requests"]) for e in built["traceEvents"] if e["ph"] == "C"]
    assert counts == [(0, 1), (1, 2), (2, 1), (2, 2), (2.5, 3), (3, 2), (4, 1), (5, 0), (6, 1), (7, 0)]


def test_a_trace_begins_at_its_origin_and_keeps_the_length_of_what_began_before():
    built = trace([recording(request(8.0, 11.0), request(1.0, 9.0))], origin=10.0)
    (only,) = slices(built, "request")
    assert (only["ts"], only["dur"], only["args"]["seconds"]) == (0.0, 1e6, 3.0)


@pytest.mark.parametrize(("host", "start"), [("a", 1.0), ("b", 31.0)])
def test_ranks_of_another_host_are_placed_by_its_time_of_day(host, start):
    mine, theirs = (Event(kind="phase", name=name, start=11.0, end=12.0) for name in "mt")
    other = recording(theirs, rank=1, host=host, wall_offset=130.0)
    built = trace([recording(mine, wall_offset=100.0), other], origin=10.0)
    assert {event["name"]: event["ts"] / 1e6 for event in slices(built, "phase")} == {"m": 1.0, "t": start}


def test_phases_add_up_to_the_seconds_of_the_step():
    timeline = Timeline(steps=(1, 1))
    timeline.begin(0)
    StepTimer(timeline.phase).seconds()
    timeline.begin(1)
    clock = StepTimer(timeline.phase)
    for name in ("generate", "verify", "generate"):
        with clock(name):
            time.sleep(0.002)
    events = timeline.take(is_last=True).events
    assert [event.name for event in events] == ["generate", "verify", "generate"]
    seconds = clock.seconds()
    for name in ("generate", "verify"):
        assert sum(event.end - event.start for event in events if event.name == name) == pytest.approx(seconds[name])
    with clock("after"):
        pass
    assert not timeline.take(is_last=True).events


@on_loop
async def test_every_request_and_state_of_a_server_is_in_the_trace(fakes):
    timeline = Timeline(steps=(0, 0))
    servers = [fakes.server(), fakes.server()]
    pool = fakes.pool(*(server.url for server in servers), timeline=timeline, health_seconds=0.5)
    await update(pool, 0)
    timeline.begin(0)
    origin = time.perf_counter()
    asked = [replace(one, label=f"step_000000 {i}#0") for i, one in enumerate(requests_of(NUM_REQUESTS))]
    for server in servers:
        server.token_seconds = 0.01
    running = asyncio.create_task(generate(pool, asked))
    await until(lambda: servers[0].prompts)
    fakes.kill(servers[0])
    await running
    await update(pool, 1)
    await generate(pool, asked[:2])
    built = trace([timeline.take(is_last=True)], origin=origin)
    await pool.close()

    assert_nested(built)
    answered = [event for event in slices(built, "request") if event["args"]["finish"] == "length"]
    assert sorted(e["name"] for e in answered) == sorted(one.label for one in (*asked, *asked[:2]))
    assert {event["args"]["tokens"] for event in answered} == {10}
    labels = [event["args"]["weights"] for event in sorted(answered, key=lambda event: event["ts"])]
    assert labels == [pool.label(0)] * NUM_REQUESTS + [pool.label(1)] * 2
    lost = [event for event in slices(built, "request") if event["args"]["finish"] != "length"]
    assert len(lost) == pool.num_retries > 0 and {event["pid"] for event in lost} == {1}
    states = defaultdict(list)
    for event in slices(built, "state"):
        states[event["pid"]].append(event["name"])
    assert states[1][:2] == ["connected", "lost"]
    assert states[2] == ["connected", "pausing", "updating", "connected"]


def test_requests_for_later_steps_overlap_the_phases_of_a_step(fakes, tmp_path, single_process):
    timeline = Timeline(tmp_path / "timeline", (0, 1))
    trainer = Trainer(
        tmp_path,
        fakes,
        single_process,
        "continuous",
        1,
        [fakes.server(token_seconds=0.005).url],
        grade,
        None,
        timeline=timeline,
    )
    for step in (0, 1):
        timeline.begin(step)
        with timeline.recorded(f"step {step}"):
            clock = StepTimer(timeline.phase)

            def train(clock=clock):
                with clock("policy"):
                    time.sleep(0.05)

            trainer.step(step, train)
        gather_timeline(timeline, single_process, step=step)
    trainer.close()
    built = json.loads((tmp_path / "timeline" / "steps_000000_000001.json").read_text())
    assert_nested(built)
    policy = next(event for event in slices(built, "phase") if event["name"] == "policy")
    during = [
        e
        for e in slices(built, "request")
        if e["ts"] < policy["ts"] + policy["dur"] and e["ts"] + e["dur"] > policy["ts"]
    ]
    assert during and all(event["name"].startswith("step_000001 ") for event in during)
    names = [event["args"]["name"] for event in built["traceEvents"] if event.get("name") == "process_name"]
    assert len(names) == 2 and names[0].startswith("trainer rank 0 on ") and names[1].startswith("server 0 at http://")


def test_a_run_that_ends_early_leaves_the_steps_that_it_had(tmp_path, single_process):
    timeline = Timeline(tmp_path / "timeline", (1, 9))
    for step in (0, 1, 2):
        timeline.begin(step)
        with timeline.recorded(f"step {step}"):
            pass
        gather_timeline(timeline, single_process, step=step)
    assert not (tmp_path / "timeline").exists()
    timeline.close()
    timeline.close()
    built = json.loads((tmp_path / "timeline" / "steps_000001_000002.json").read_text())
    assert [event["name"] for event in slices(built, "phase")] == ["step 1", "step 2"]


def test_nothing_is_recorded_without_steps(tmp_path, single_process):
    timeline = Timeline(tmp_path / "timeline", None)
    timeline.begin(0)
    with timeline.recorded("step 0"):
        timeline.request_begins("id", "name", 0)
        timeline.state(0, "http://s", "connected", "")
        timeline.request_ends("id", {})
    gather_timeline(timeline, single_process, step=0)
    timeline.close()
    assert not list(tmp_path.iterdir())
