"""A client of one SGLang server. Its methods have the names of the server's HTTP endpoints."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import logging
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from oreal_megatron.config.rollout import VERIFICATION_OPTIONS

# httpx logs a line for every request.
logging.getLogger("httpx").setLevel(logging.WARNING)

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""SGLang's tags of memory that a server can release (`GPU_MEMORY_TYPE_WEIGHTS`, `GPU_MEMORY_TYPE_KV_CACHE`)."""

# Time for a connection of /health.
_CONNECT_SECONDS = 10.0
# Seconds of silence after which TCP probes a connection, and between two probes.
_PROBE_SECONDS = 5.0
_RETRY_SECONDS = 1.0
# Connections for control requests while requests for generation take all others.
_SPARE_CONNECTIONS = 8


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    """Returns the context shared by all clients: reading the certificates takes 25 ms of CPU time."""
    return httpx.create_ssl_context(trust_env=False)


def _signs_of_life(seconds: float) -> list[tuple[int, int, int]]:
    """Returns socket options with which TCP closes a connection whose other end is gone.

    Without them a request without a time limit waits for ever if the host of its server lost its connections, or if a
    firewall between them dropped an idle connection. TCP_USER_TIMEOUT takes the place of a number of probes.

    seconds: time without an answer of the other end's kernel after which the connection is closed.
    """
    probe_seconds = max(int(min(_PROBE_SECONDS, seconds / 4)), 1)
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_seconds),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(1000 * seconds), 1)),
    ]


def _is_unreachable(error: BaseException) -> bool:
    """Returns whether an error comes from a host to which there is no way at present, not from one that refuses."""
    while True:
        if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            return True
        inner = error.__cause__ or error.__context__
        if inner is None:
            return False
        error = inner


class ServerLost(ConnectionError):
    """The server did not answer, closed the connection, or answered 5xx. Another server may answer the same request."""


class RequestRefused(ValueError):
    """The server answered 4xx, as every other server would."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A response of /generate."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Mapping[str, Any]
    """SGLang's finish_reason. `type`: stop, length or abort (the tokens are those generated before the abort);
    `matched`: the token at which the response stopped."""
    weight_labels: tuple[tuple[str, int], ...]
    """Spans of tokens by the weights that generated them, in order: the label, and the end of the span."""


_TARGET = {"selector": "target"}
"""Restricts a request to the target model; SGLang would call the weight loader for a draft model too."""


@dataclass(frozen=True, kw_only=True)
class ServerDescription:
    """A server's answers to /model_info and /server_info."""

    model_path: str
    weight_label: str
    dtype: str
    version: str
    """SGLang's version."""
    device: str
    tensor: int
    """Tensor-parallel ranks."""
    weight_loaders: tuple[str, ...]
    """Functions that the server was started with as --custom-weight-loader."""
    saves_memory: bool
    """Whether the server was started with --enable-memory-saver."""
    verification: Mapping[str, Any]
    """Values of VERIFICATION_OPTIONS that the server was started with."""


class ServerClient:
    """A client of one server, for one event loop. Every method may raise ServerLost or RequestRefused."""

    def __init__(self, url: str, *, max_concurrency: int, control_seconds: float, health_seconds: float):
        """Opens no connection yet.

        control_seconds, health_seconds: see rollout.sglang. A connection that is not made, or has no sign of life, in
        `health_seconds` is closed, and one that the server's host does not know any more within 5 seconds.
        """
        self.url = url
        self._control_seconds = control_seconds
        self._health_seconds = health_seconds
        connections = max_concurrency + _SPARE_CONNECTIONS
        self._http = httpx.AsyncClient(
            base_url=url,
            transport=httpx.AsyncHTTPTransport(
                # Every request has a connection of its own. SGLang closes a connection that was idle for 5 seconds, and
                # httpcore's pool one that expires, also when a request has just been given to it; on a busy machine
                # such a request is lost. The search for an idle connection would also take longer than a new one.
                limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
                verify=_ssl_context(),
                trust_env=False,
                socket_options=_signs_of_life(health_seconds),
            ),
            timeout=None,  # every request has its own
            trust_env=False,  # the machine's proxy settings are for other hosts
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(
        self, rid: str, prompt_ids: Sequence[int], sampling: Mapping[str, Any], *, cache_key: str | None = None
    ) -> Generated:
        """POST /generate: returns the response to one prompt, without a time limit.

        cache_key: the server's cache of prefixes is shared by requests with the same key only.
        """
        body = {"rid": rid, "input_ids": list(prompt_ids), "sampling_params": dict(sampling), "return_logprob": True}
        if cache_key is not None:
            body["extra_key"] = cache_key
        answer = await self._ask("POST", "/generate", body, seconds=None)
        about = answer["meta_info"]
        pairs = about.get("output_token_logprobs") or []  # absent if the request was aborted before its first token
        ids = tuple(answer["output_ids"])
        if ids != tuple(token for _, token, *_ in pairs):
            raise ServerLost(
                f"{self.url}: {rid} has {len(ids)} tokens and {len(pairs)} log-probabilities, of other tokens"
            )
        if any(logprob is None for logprob, *_ in pairs):  # JSON has no NaN
            raise ServerLost(
                f"{self.url}: {rid} has log-probabilities that are not numbers; the server's weights are damaged"
            )
        spans = about.get("weight_versions") or []
        return Generated(
            token_ids=ids,
            logprobs=tuple(logprob for logprob, *_ in pairs),
            finish=about["finish_reason"],
            weight_labels=tuple((str(span["version"]), int(span["end"])) for span in spans)
            or ((str(about["weight_version"]), len(ids)),),
        )

    async def abort_request(self, rid: str) -> None:
        """POST /abort_request: ends a response, which returns with its tokens so far. Unknown ids are ignored."""
        await self._ask("POST", "/abort_request", {"rid": rid})

    async def is_healthy(self, seconds: float) -> bool:
        """GET /health: returns whether the server generates a token, or has generated one, within `seconds`."""
        try:
            # Several attempts to connect fit into the time: a lost one is repeated after 1, 3, 7, 15 and 31 seconds.
            response = await self._http.get(
                "/health", timeout=httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
            )
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def describe(self) -> ServerDescription:
        """GET /model_info and /server_info."""
        model, server = await self._ask("GET", "/model_info"), await self._ask("GET", "/server_info")
        return ServerDescription(
            model_path=str(model["model_path"]),
            weight_label=str(model["weight_version"]),
            dtype=str(server["dtype"]),
            version=str(server["version"]),
            device=str(server["device"]),
            tensor=int(server["tp_size"]),
            weight_loaders=tuple(server.get("custom_weight_loader") or ()),
            saves_memory=bool(server.get("enable_memory_saver")),
            verification={
                name: server.get(name.replace("-", "_"), default) for name, default in VERIFICATION_OPTIONS.items()
            },
        )

    async def weight_label(self) -> str:
        """GET /model_info: returns the label of the server's weights (SGLang: weight_version)."""
        return str((await self._ask("GET", "/model_info"))["weight_version"])

    async def pause_generation(self, *, keep_cache: bool = False) -> None:
        """POST /pause_generation: stops generation until `continue_generation`.

        keep_cache: whether running requests then go on with their KV cache; otherwise it is computed again.
        """
        await self._ask("POST", "/pause_generation", {"mode": "in_place" if keep_cache else "retract"})

    async def begin_weight_update(self) -> None:
        """POST /begin_weight_update: allows the target model's weights to change until `end_weight_update`."""
        await self._ask("POST", "/begin_weight_update", _TARGET)

    async def end_weight_update(self) -> None:
        """POST /end_weight_update."""
        await self._ask("POST", "/end_weight_update", {})

    async def update_weights_from_disk(self, directory: Path) -> None:
        """POST /update_weights_from_disk. directory: in Hugging Face's layout."""
        body = {"model_path": str(directory), "load_format": "auto", "flush_cache": False}
        await self._ask("POST", "/update_weights_from_disk", body)

    async def update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str) -> None:
        """POST /update_weights_from_tensor. payloads: one pickled list of (name, tensor) per tensor-parallel rank."""
        encoded = [base64.b64encode(payload).decode() for payload in payloads]
        body = {"serialized_named_tensors": encoded, "load_format": load_format, "flush_cache": False, **_TARGET}
        await self._ask("POST", "/update_weights_from_tensor", body)

    async def init_weights_update_group(self, group: Mapping[str, Any]) -> None:
        """POST /init_weights_update_group."""
        await self._ask("POST", "/init_weights_update_group", group)

    async def update_weights_from_distributed(self, tensors: Mapping[str, Any]) -> None:
        """POST /update_weights_from_distributed."""
        await self._ask("POST", "/update_weights_from_distributed", {**tensors, "flush_cache": False, **_TARGET})

    async def destroy_weights_update_group(self, name: str) -> None:
        """POST /destroy_weights_update_group."""
        await self._ask("POST", "/destroy_weights_update_group", {"group_name": name})

    async def flush_cache(self) -> None:
        """POST /flush_cache: drops the KV cache of all prefixes, which was computed with old weights."""
        await self._ask("POST", "/flush_cache")

    async def freeze_gc(self) -> None:
        """POST /freeze_gc: calls gc.freeze() on the server. SGLang's own call at its start may fail."""
        with contextlib.suppress(RequestRefused):
            await self._ask("POST", "/freeze_gc")

    async def update_weight_version(self, label: str) -> None:
        """POST /update_weight_version: sets the label of the server's weights."""
        await self._ask("POST", "/update_weight_version", {"new_version": label, "abort_all_requests": False})

    async def release_memory_occupation(self, tags: Sequence[str]) -> None:
        """POST /release_memory_occupation, of a paused server. SGLang exits if a tag is released already."""
        await self._ask("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory_occupation(self, tags: Sequence[str]) -> None:
        """POST /resume_memory_occupation: reallocates released memory; its contents are undefined."""
        await self._ask("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def continue_generation(self) -> None:
        """POST /continue_generation."""
        await self._ask("POST", "/continue_generation", {})

    async def _connected(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float | None
    ) -> httpx.Response:
        """Sends a request over a new connection. A host that cannot be reached for a while is tried again.

        seconds: time limit of the answer, and of the connection if it is below health_seconds; None: no limit.
        """
        limit = self._health_seconds if seconds is None else min(seconds, self._health_seconds)
        deadline = time.monotonic() + limit
        while True:
            left = max(deadline - time.monotonic(), _RETRY_SECONDS)
            try:
                return await self._http.request(method, path, json=body, timeout=httpx.Timeout(seconds, connect=left))
            except httpx.ConnectError as error:
                if not _is_unreachable(error) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, seconds: float | None = -1.0
    ) -> Any:
        """seconds: time limit of the answer; None: no limit; negative: the limit of control requests."""
        timeout = self._control_seconds if seconds is not None and seconds < 0 else seconds
        try:
            response = await self._connected(method, path, body, timeout)
        except httpx.HTTPError as error:
            raise ServerLost(f"{self.url}{path}: {type(error).__name__} {error}".rstrip()) from error
        if response.status_code >= 500:
            raise ServerLost(f"{self.url}{path} answered {response.status_code}: {response.text[:300]}")
        if response.status_code >= 400:
            raise RequestRefused(f"{self.url}{path} answered {response.status_code}: {response.text[:500]}")
        try:
            return response.json()
        except ValueError:
            return response.text
