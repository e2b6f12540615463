"""The engine's publications and generation, on fake SGLang servers and one process."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.rollout.conversation import LoopGenerator
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.servers.server_process import NO_WEIGHTS
from oreal_megatron.stopping import LostPeer, Stopped, StopRequest
from oreal_megatron.types import GenerationRequest
from tests.fake_sglang import fake_servers, free_port, response

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=10)
COLOCATED = {"placement": "colocated", "transport": "ipc"}


class Groups:
    """One process, which leads the only replica."""

    is_main = leads_replica = True
    data_size = 1

    def from_main(self, value):
        return value

    from_replica_leader = any_rank = any_of_replica = from_main

    def barrier(self):
        pass

    check_others = barrier


class Publisher:
    """Loads nothing into the servers, except for failures: one mapping a delivery, of index to (reason, is_lost)."""

    def __init__(self):
        self.failures = []
        self.delivered = []

    def prepare(self, weight_version):
        pass

    def deliver(self, servers):
        self.delivered.append([server.index for server in servers])
        for server in servers:
            server.update_weights_from_tensor([b"payload"], "direct").result(5)
        failing = self.failures.pop(0) if self.failures else {}
        failures = {
            server.name: SimpleNamespace(reason=failing[server.index][0], is_lost=failing[server.index][1])
            for server in servers
            if server.index in failing
        }
        return SimpleNamespace(failures=failures, num_bytes=100 * len(servers), seconds={"transfer": 0.5})

    def close(self):
        pass


@pytest.fixture
def fakes(tmp_path):
    with fake_servers(tmp_path) as opened:
        yield opened


@pytest.fixture
def open_engine(fakes):
    """Opens engines, which are closed after the test. options: of rollout.sglang; groups: in place of Groups."""
    engines = []

    def open_(*urls, groups=None, stop=None, **options):
        pool, publisher = fakes.pool(*urls, **options), Publisher()
        engine = SGLangEngine(
            pool, publisher, groups or Groups(), stop=stop or StopRequest(), timeout_seconds=1.0,
            shares_devices=options == COLOCATED,
        )  # fmt: skip
        engines.append(engine)
        return engine, publisher, pool

    yield open_
    for engine in engines:
        engine.close()


def requests_of(num, num_tokens=10):
    return [GenerationRequest(prompt_ids=(5, 20 + i // 2), seed=i, max_new_tokens=num_tokens) for i in range(num)]


def generate(engine, requests, is_enough=None):
    """Returns the completions of every unit, by position."""
    units = [[requests[i] for i in unit] for unit in engine.units(requests)]
    return dict(engine.generate(units, GREEDY, is_enough))


def assert_tokens(found, requests):
    for position, completions in found.items():
        prompt = requests[2 * position].prompt_ids
        assert [c.token_ids for c in completions] == [response(prompt, 10)] * 2


def test_units_are_the_responses_to_one_prompt(open_engine):
    engine, _, _ = open_engine()
    assert engine.units(requests_of(4)) == [[0, 1], [2, 3]]


def test_publish_and_generate_on_launched_servers(open_engine):
    engine, publisher, _ = open_engine(num_servers=2)
    report = engine.publish(3)
    assert publisher.delivered == [[0, 1]] and engine.weight_version == 3
    assert report["publication/servers"] == 2 and report["publication/failures"] == 0
    assert report["publication/bytes"] == 200 and report["publication/transfer_seconds"] == 0.5
    found = generate(engine, requests_of(8))
    assert sorted(found) == [0, 1, 2, 3]
    assert_tokens(found, requests_of(8))
    assert {span.version for unit in found.values() for c in unit for span in c.weight_spans} == {3}


def test_loops_of_several_turns_share_the_servers(open_engine):
    """Every loop's second turn begins from its first turn and what it inserted."""
    engine, _, _ = open_engine(num_servers=2)
    engine.publish(3)

    async def loop(*, conversation, prompt_ids, **_):
        first = await conversation.generate(4)
        assert first.token_ids == response(prompt_ids, 4) and first.weight_version == 3
        conversation.append_ids([7, 8])
        await conversation.generate(3)

    renderer = SimpleNamespace(response_text=str, check_rows=lambda ids, source: None)
    settings = {"name": "loop", "seconds": 20.0, "all_units_at_once": True}
    loops = LoopGenerator(engine, loop, renderer, Groups(), StopRequest(), **settings)
    requests = requests_of(8)
    found = generate(loops, requests)
    assert sorted(found) == [0, 1, 2, 3]
    for position, completions in found.items():
        prompt = requests[2 * position].prompt_ids
        begun = (*response(prompt, 4), 7, 8)
        assert [c.token_ids for c in completions] == [begun + response(prompt + begun, 3)] * 2
        assert [c.inserted_spans for c in completions] == [((4, 6),)] * 2
        assert [len(c.logprobs) for c in completions] == [7, 7]
        assert {(span.version, span.start, span.end) for c in completions for span in c.weight_spans} == {(3, 0, 9)}


def test_publish_sends_again_to_a_server_that_is_alive(open_engine):
    engine, publisher, _ = open_engine(num_servers=2)
    engine.publish(0)
    publisher.failures = [{1: ("audit failed", False)}]
    report = engine.publish(1)
    assert publisher.delivered[1:] == [[0, 1], [1]]
    assert report["publication/failures"] == 1 and report["publication/servers"] == 2


def test_publish_counts_a_server_that_fails_twice_as_lost(open_engine):
    engine, publisher, _ = open_engine(num_servers=2)
    engine.publish(0)
    publisher.failures = [{1: ("audit failed", False)}] * 2
    report = engine.publish(1)
    assert report["publication/failures"] == 2 and report["publication/servers"] == 1


def test_publish_does_not_send_again_to_a_lost_server(open_engine):
    engine, publisher, _ = open_engine(num_servers=2)
    engine.publish(0)
    publisher.failures = [{1: ("died", True)}]
    assert engine.publish(1)["publication/servers"] == 1
    assert publisher.delivered[1:] == [[0, 1]]


def test_publish_that_raises_leaves_attached_servers_generating(fakes, open_engine, monkeypatch):
    server = fakes.server()
    engine, publisher, _ = open_engine(server.url)
    engine.publish(0)

    def deliver(servers):
        assert server.is_paused and server.is_updating
        raise OSError("No space left on device")

    monkeypatch.setattr(publisher, "deliver", deliver)
    with pytest.raises(OSError, match="No space left"):
        engine.publish(1)
    assert not server.is_paused and not server.is_updating and server.label == NO_WEIGHTS


@pytest.mark.parametrize("num_servers", [1, 2])
def test_first_publish_that_fails_twice_raises(open_engine, num_servers):
    engine, publisher, _ = open_engine(num_servers=num_servers)
    publisher.failures = [{num_servers - 1: ("audit failed", False)}] * 2
    with pytest.raises(NoServerError, match="audit failed"):
        engine.publish(0)


def test_first_publish_to_another_model_raises(fakes, open_engine):
    engine, publisher, _ = open_engine(fakes.server(info={"tp_size": 2}).url)
    with pytest.raises(NoServerError, match=r"rollout\.sglang\.tensor"):
        engine.publish(0)
    assert not publisher.delivered


def kill_when_busy(fakes):
    """Kills launched server 0 once it has requests."""
    fake = fakes.last(0)
    fake.token_seconds = 0.05

    def strike():
        while not fake.prompts:
            time.sleep(0.005)
        fakes.kill(fake)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


def test_weights_are_sent_again_to_a_server_that_dies_in_generation(fakes, open_engine):
    engine, publisher, pool = open_engine()
    engine.publish(0)
    thread = kill_when_busy(fakes)
    found = generate(engine, requests_of(4))
    thread.join()
    assert_tokens(found, requests_of(4))
    assert publisher.delivered == [[0], [0]] and len(fakes.started) == 2 and pool.num_retries > 0


@pytest.mark.parametrize("case", ["replicas", "colocated"])
def test_weights_that_cannot_be_sent_again_end_the_run(fakes, open_engine, case):
    groups = Groups()
    groups.data_size = 2 if case == "replicas" else 1
    engine, _, _ = open_engine(groups=groups, **(COLOCATED if case == "colocated" else {}))
    engine.publish(0)
    with pytest.raises(NoServerError, match="current weights"), engine.generation_context(contextlib.nullcontext):
        kill_when_busy(fakes)
        generate(engine, requests_of(4))


def test_early_stop_returns_every_unit(fakes, open_engine):
    fake = fakes.server()
    engine, _, _ = open_engine(fake.url)
    engine.publish(0)
    fake.token_seconds = 0.05
    found = generate(engine, requests_of(6, 200), lambda: bool(fake.prompts))
    assert sorted(found) == [0, 1, 2]
    assert all(c.finish_reason is None for unit in found.values() for c in unit)


def test_abandoned_generation_leaves_the_engine_usable(fakes, open_engine):
    engine, _, _ = open_engine(fakes.server().url)
    engine.publish(0)
    requests = requests_of(8)
    running = engine.generate([[requests[i] for i in unit] for unit in engine.units(requests)], GREEDY)
    next(running)
    running.close()
    assert_tokens(generate(engine, requests_of(4)), requests_of(4))


def test_refused_request_raises_in_generate(fakes, open_engine):
    fake = fakes.server()
    engine, _, _ = open_engine(fake.url)
    engine.publish(0)
    fake.break_("/generate", "status", 400)
    with pytest.raises(ValueError, match="400"):
        generate(engine, requests_of(2))


def test_colocated_engine_takes_turns_with_the_trainer(fakes, open_engine):
    fake, turns = fakes.server(), []

    @contextlib.contextmanager
    def policy_on_device():
        turns.append(("trainer", frozenset(fake.released)))
        yield

    engine, publisher, _ = open_engine(fake.url, **COLOCATED)
    engine.publish(0)
    with engine.generation_context(policy_on_device):
        assert not turns and not fake.released  # the weights were published just now
        assert_tokens(generate(engine, requests_of(4)), requests_of(4))
    assert fake.released == {"weights", "kv_cache"}
    with engine.generation_context(policy_on_device):
        assert turns == [("trainer", {"weights", "kv_cache"})] and not fake.released
        generate(engine, requests_of(2))
    engine.offload()
    assert publisher.delivered == [[0], [0]] and fake.exit_code is None


def test_engine_with_servers_of_its_own_is_never_offloaded(fakes, open_engine):
    fake = fakes.server()
    engine, _, _ = open_engine(fake.url)
    engine.publish(0)
    with engine.generation_context(contextlib.nullcontext):
        generate(engine, requests_of(2))
    engine.offload()
    assert not fake.released and not fake.is_paused


def test_stop_ends_the_wait_for_servers(open_engine):
    stop = StopRequest()
    engine, publisher, _ = open_engine(f"http://127.0.0.1:{free_port()}", stop=stop, startup_seconds=1000.0)
    threading.Timer(0.3, lambda: setattr(stop, "signal", "SIGTERM")).start()
    with pytest.raises(Stopped, match="rollout servers were waited for"):
        engine.publish(0)
    assert not publisher.delivered


def test_stop_ends_generation_before_its_units_are_finished(fakes, open_engine):
    fake, stop = fakes.server(), StopRequest()
    engine, _, _ = open_engine(fake.url, stop=stop)
    engine.publish(0)
    fake.token_seconds = 1000.0
    threading.Timer(0.3, lambda: setattr(stop, "signal", "SIGTERM")).start()
    assert generate(engine, requests_of(4)) == {}


def test_replica_that_waits_ends_with_another_that_failed(fakes, open_engine):
    """Its servers wait for weights that the main rank, which has failed, does not send any more."""

    class Failed(Groups):
        def check_others(self):
            raise LostPeer("rank 1 stops: rank 0 failed")

    fake, groups = fakes.server(), Groups()
    engine, _, _ = open_engine(fake.url, groups=groups)
    engine.publish(0)
    fake.token_seconds = 1000.0
    groups.check_others = Failed().check_others
    with pytest.raises(LostPeer):
        generate(engine, requests_of(4))
