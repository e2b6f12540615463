"""An SGLang server without a model, in this process: it speaks SGLang's endpoints and misbehaves where a test asks.

Every token is a function of all tokens before it, so a response that continues elsewhere has the same tokens as one
that was never interrupted.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import SGLangConfig
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.server import ServerSettings
from oreal_megatron.servers.server_process import NO_WEIGHTS, Launcher, ServerStartError
from oreal_megatron.timeline import Timeline

LOADER = "fake.load"
STOP = 7
TOKEN_SECONDS = 0.001
TAGS = {"weights", "kv_cache"}


@functools.cache
def _defaults() -> dict[str, Any]:
    """Returns the settings of `rollout=sglang_cpu` with short time limits."""
    config = validated(composed(["experiment=arithmetic", "rollout=sglang_cpu"])).rollout.sglang
    assert config is not None
    short = {"max_concurrency": 4, "startup_seconds": 10.0, "health_seconds": 5.0, "control_seconds": 5.0}
    return {**config.model_dump(), **short, "max_restarts": 2}


def sglang_config(**options: Any) -> SGLangConfig:
    """Returns settings with short time limits. options: of rollout.sglang."""
    return SGLangConfig(**{**_defaults(), **options})


def next_token(ids: Sequence[int]) -> int:
    """Returns the token after `ids`, which is never the stop token."""
    return 10 + (31 * sum(ids) + 7 * len(ids)) % 89


def response(prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Returns the tokens that every fake server generates for a prompt."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return tuple(ids[len(prompt) :])


@dataclass
class Fault:
    """A way in which an endpoint misbehaves, `times` times; None: until it is removed."""

    how: str
    """delay, hang, drop (closes the connection), part (half an answer), or status."""
    value: float = 0
    """Seconds of a delay; the HTTP status."""
    times: int | None = None


@dataclass
class FakeSGLang:
    """One server. Attributes may be changed by a test while it runs."""

    port: int = 0
    host: str = "127.0.0.1"
    label: str = NO_WEIGHTS
    answer_label: str | None = None
    """Label in responses, if other than `label`."""
    token_seconds: float = TOKEN_SECONDS
    stop_after: int | None = None
    """Tokens after which a response ends with `stop_token`; None: responses end by length."""
    stop_token: int = STOP
    info: dict[str, Any] = field(default_factory=dict)
    """Entries of /server_info and /model_info that differ."""
    calls: list[str] = field(default_factory=list)
    """Control requests, without repetitions in a row."""
    selectors: dict[str, str] = field(default_factory=dict)
    """Models, as target, draft or all, that requests of a weight update named."""
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    """input_ids of every /generate."""
    cache_keys: list[str | None] = field(default_factory=list)
    """extra_key of every /generate."""
    pauses: list[str] = field(default_factory=list)
    """Modes of pauses."""
    num_running: int = 0
    """Responses under way."""
    most_running: int = 0
    """Largest number of responses under way at the same time."""
    num_tokens: int = 0
    """Tokens of all responses, also of those that nobody waits for any more."""
    exit_code: int | None = None
    released: set[str] = field(default_factory=set)
    is_paused: bool = False
    is_updating: bool = False

    def __post_init__(self) -> None:
        self._faults: dict[str, list[Fault]] = defaultdict(list)
        self._aborted: set[str] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def break_(self, path: str, how: str, value: float = 0, times: int | None = None) -> None:
        """Makes an endpoint misbehave; see Fault."""
        self._faults[path].append(Fault(how, value, times))

    def mend(self) -> None:
        """Removes all faults."""
        self._faults.clear()

    def abort(self) -> None:
        """Aborts all running responses, as another client may."""
        self._aborted.add("*")

    async def start(self) -> FakeSGLang:
        self._server = await asyncio.start_server(self._connected, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.exit_code = None
        return self

    def die(self) -> None:
        """Closes the port and all connections. Call on the event loop."""
        self.exit_code = 1
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; returns whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ", 2)[1]
        length = next((int(x.split(":")[1]) for x in head.splitlines() if x.lower().startswith("content-length")), 0)
        body = json.loads(await reader.readexactly(length) or b"{}")
        fault = self._next_fault(path)
        if fault is not None and fault.how == "delay":
            await asyncio.sleep(fault.value)
        if fault is not None and fault.how == "hang":
            await asyncio.sleep(3600)
        if fault is not None and fault.how == "drop":
            return False
        if fault is not None and fault.how == "status":
            status, answer = int(fault.value), {"error": "asked to fail"}
        else:
            status, answer = await self._handle(path, body)
        text = json.dumps(answer).encode()
        sent = text[: len(text) // 2] if fault is not None and fault.how == "part" else text
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + sent)
        await writer.drain()
        return sent == text

    def _next_fault(self, path: str) -> Fault | None:
        faults = self._faults[path]
        if not faults:
            return None
        fault = faults[0]
        if fault.times is not None:
            fault.times -= 1
            if fault.times == 0:
                faults.pop(0)
        return fault

    async def _handle(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
            try:
                return 200, await self._generate(body)
            finally:
                self.num_running -= 1
        if path == "/abort_request":
            self._aborted.add(body["rid"])
            return 200, {}
        if path == "/health":
            return 200, {}
        if path in ("/model_info", "/server_info"):
            described = {
                "model_path": "m", "weight_version": self.label, "dtype": "float32", "version": "0.5.23",
                "device": "cpu", "tp_size": 1, "custom_weight_loader": [LOADER], "enable_memory_saver": False,
            }  # fmt: skip
            return 200, {**described, **self.info}
        return self._control(path, body)

    def _control(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Changes the server's state; refuses what is out of turn, and dies where SGLang does."""
        tags = set(body.get("tags", ()))
        call = " ".join([path, *sorted(tags), *(["asleep"] if body.get("new_version") == "asleep" else [])])
        if self.calls[-1:] != [call]:
            self.calls.append(call)
        if "selector" in body:
            self.selectors[path] = body["selector"]
        if path == "/pause_generation":
            self.is_paused = True
            self.pauses.append(body["mode"])
        elif path == "/continue_generation":
            self.is_paused = False
        elif path in ("/begin_weight_update", "/end_weight_update"):
            self.is_updating = path == "/begin_weight_update"
            if self.is_updating and not self.is_paused:
                return 400, {"error": "the server generates"}
        elif path.startswith(("/update_weights_from", "/init_weights", "/destroy_weights")):
            return (200, {}) if self.is_updating and "weights" not in self.released else (400, {"error": "no update"})
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/release_memory_occupation":
            if not self.is_paused or tags & self.released or not tags <= TAGS:
                self.die()
            self.released |= tags
        elif path == "/resume_memory_occupation":
            if not tags or not tags <= self.released:
                self.die()
            self.released -= tags
        elif path == "/flush_cache":
            if self.num_running and self.pauses[-1:] != ["retract"]:
                return 400, {"error": "there are requests"}
        elif path != "/freeze_gc":
            return 404, {"error": path}
        return 200, {}

    async def _is_aborted(self, rid: str) -> bool:
        """Returns True if the response is aborted before its next token, which is generated while not paused."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.token_seconds
        while clock() < deadline or self.is_paused:
            if not self._aborted.isdisjoint((rid, "*")):
                return True
            await asyncio.sleep(TOKEN_SECONDS)
        return False

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, rid = list(body["input_ids"]), body["rid"]
        self.prompts.append(tuple(ids))
        self.cache_keys.append(body.get("extra_key"))
        start, finish = len(ids), {"type": "length"}
        labels: list[str] = []
        self._aborted.discard("*")
        for number in range(body["sampling_params"]["max_new_tokens"]):
            if await self._is_aborted(rid):
                finish = {"type": "abort"}
                break
            labels.append(self.label if self.answer_label is None else self.answer_label)
            if number == self.stop_after:
                ids.append(self.stop_token)
                finish = {"type": "stop", "matched": self.stop_token}
                break
            ids.append(next_token(ids))
            if ids[-1] in body["sampling_params"].get("stop_token_ids", ()):
                finish = {"type": "stop", "matched": ids[-1]}
                break
        output = ids[start:]
        self.num_tokens += len(output)
        # Their ends, by label: a label that changes back would merge spans, which no test does.
        ends = {label: number for number, label in enumerate(labels, 1)}
        spans = [
            {"version": label, "start": start, "end": end}
            for (label, end), start in zip(ends.items(), [0, *ends.values()], strict=False)
        ]
        return {
            "output_ids": output,
            "meta_info": {
                "output_token_logprobs": [[-token / 100, token, None] for token in output],
                "finish_reason": finish,
                "weight_version": self.label,
                "weight_versions": spans,
            },
        }


class FakeProcess:
    """A fake server in the place of a child process."""

    def __init__(self, server: FakeSGLang, loop: asyncio.AbstractEventLoop, log: Path):
        self._server = server
        self._loop = loop
        self.log = log
        self.pid = server.port

    @property
    def exit_code(self) -> int | None:
        return self._server.exit_code

    def log_tail(self) -> str:
        return "    last line of the log"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._server.die)


@dataclass(frozen=True, kw_only=True)
class FakeLauncher(Launcher):
    """Starts fake servers on the event loop of `FakeServers`."""

    fakes: FakeServers

    def start(self, index: int, port: int, *, place: int | None = None) -> FakeProcess:  # type: ignore[override]
        """Starts the server at once, unless `prepare` delays it or makes it end."""
        if self.fakes.start_error is not None:
            raise ServerStartError(self.fakes.start_error)
        server = FakeSGLang(port=port)
        self.fakes.started.append((index, server))
        self.fakes.prepare(index, server)
        if server.exit_code is None:
            self.fakes.run(server.start())
        return FakeProcess(server, self.fakes.loop, Path("server.log"))


class FakeServers:
    """Fake servers on an event loop in a thread of their own, and pools that use them."""

    def __init__(self, directory: Path):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._directory = directory
        self.started: list[tuple[int, FakeSGLang]] = []
        """(index in the pool, server) of every launch, in order."""
        self.start_error: str | None = None
        self.prepare: Callable[[int, FakeSGLang], None] = lambda index, server: None
        """Called with every launched server before it starts."""

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the servers' loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def server(self, **options: Any) -> FakeSGLang:
        """Starts a server to attach to. options: attributes of FakeSGLang."""
        server: FakeSGLang = self.run(FakeSGLang(**options).start())
        return server

    def kill(self, server: FakeSGLang) -> None:
        """Kills a server at once."""

        async def die() -> None:
            server.die()

        self.run(die())

    def last(self, index: int) -> FakeSGLang:
        """Returns the server that was last launched for an index."""
        return next(server for number, server in reversed(self.started) if number == index)

    def settings(
        self,
        check: Any = lambda url, found: None,
        run: str = "run",
        timeline: Timeline | None = None,
        keep_cache: bool = False,
        **options: Any,
    ) -> ServerSettings:
        """Returns settings with short time limits. options: of rollout.sglang."""
        config = sglang_config(**options)
        launcher = FakeLauncher(
            config=config, model=self._directory / "servers" / "model", weight_loader=LOADER, dtype="float32",
            max_sequence_length=256, logs=self._directory, fakes=self,
        )  # fmt: skip
        timeline = Timeline() if timeline is None else timeline
        return ServerSettings(
            config=config, launcher=launcher, check=check, run=run, poll_seconds=0.01, keep_cache=keep_cache,
            timeline=timeline,
        )  # fmt: skip

    def pool(self, *urls: str, **options: Any) -> ServerPool:
        """Returns a pool; without URLs it launches servers. options: of `settings`."""
        settings = self.settings(urls=urls, **options)
        return ServerPool(settings, stop_token_id=STOP, config_json={})

    def close(self) -> None:
        """Ends all servers and the thread."""

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def fake_servers(directory: Path) -> Iterator[FakeServers]:
    """Opens fake servers for one test."""
    fakes = FakeServers(directory)
    try:
        yield fakes
    finally:
        fakes.close()


def free_port() -> int:
    """Returns a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
