"""The life of a server that shares the trainer's devices: its order, on a real one.

On CPU SGLang releases no memory, but it takes the orders, and ends where one comes out of turn.
"""

from __future__ import annotations

import contextlib

import pytest

from oreal_megatron.servers.client import ServerClient
from oreal_megatron.servers.request_queue import NoServerError
from tests.servers.test_servers import GREEDY, PROMPTS, assert_as_transformers, requests_of
from tests.tiny_servers import open_servers

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]

TAKES_WEIGHTS = ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
GOES_ON = ["/flush_cache", "/update_weight_version", "/continue_generation", "/generate"]
GIVES_BACK = ["/pause_generation", "/update_weight_version asleep", "/release_memory_occupation kv_cache weights"]


def open_colocated(servers, groups, source, directory):
    url = servers.pool.servers[0].client.url
    return open_servers(groups, source, directory, urls=(url,), placement="colocated", transport="ipc")


@pytest.fixture
def happened(monkeypatch):
    """Control requests to servers, and arrivals and departures of the policy, without repetitions in a row."""
    seen: list[str] = []
    real = ServerClient._ask

    async def ask(self, method, path, body=None, **options):
        answer = await real(self, method, path, body, **options)
        if "memory" in path:
            path = " ".join([path, *body["tags"]])
        if body == {"new_version": "asleep", "abort_all_requests": False}:
            path += " asleep"
        if method == "POST" and seen[-1:] != [path]:
            seen.append(path)
        return answer

    monkeypatch.setattr(ServerClient, "_ask", ask)
    return seen


def test_a_server_and_the_trainer_take_turns(servers, single_process, tiny_qwen, tmp_path, happened):
    @contextlib.contextmanager
    def policy_on_device():
        happened.append("policy comes")
        yield
        happened.append("policy goes")

    def generated():
        with other.engine.generation_context(policy_on_device):
            return other.generate(requests_of(PROMPTS), GREEDY)

    other = open_colocated(servers, single_process, tiny_qwen, tmp_path)
    pid = servers.pool.servers[0].process.pid
    try:
        other.engine.publish(0)
        assert_as_transformers(generated(), tiny_qwen)
        # It holds KV memory only while it generates, and nothing once it has.
        assert happened == ["/freeze_gc", "/pause_generation", *TAKES_WEIGHTS, *GOES_ON, *GIVES_BACK]

        happened.clear()
        other.perturb()
        other.engine.publish(1)
        other.engine.offload()  # for a checkpoint
        assert happened == [
            "/resume_memory_occupation weights",
            *TAKES_WEIGHTS,
            "/update_weight_version asleep",
            "/release_memory_occupation weights",
        ]

        # What it had is gone: it is sent again, though no update was made, and leaves the policy no room.
        happened.clear()
        assert_as_transformers(generated(), other.written())
        assert happened == [
            "policy comes",
            "/resume_memory_occupation weights",
            *TAKES_WEIGHTS,
            "policy goes",
            "/resume_memory_occupation kv_cache",
            *GOES_ON,
            *GIVES_BACK,
        ]
    finally:
        # The next test finds a server that answers.
        other.engine.publish(2)
        other.engine._on_main(other.pool.onload)
        other.engine.close()
    assert servers.pool.servers[0].process.pid == pid
    assert servers.pool.servers[0].process.exit_code is None


def test_a_server_that_nobody_woke_is_refused(servers, single_process, tiny_qwen, tmp_path):
    first = open_colocated(servers, single_process, tiny_qwen, tmp_path / "first")
    second = open_colocated(servers, single_process, tiny_qwen, tmp_path / "second")
    try:
        first.engine.publish(0)
        first.engine.offload()
        with pytest.raises(NoServerError, match="has released its memory to a run"):
            second.engine.publish(0)
    finally:
        first.engine.publish(1)
        first.engine._on_main(first.pool.onload)
        first.engine.close()
        second.engine.close()
