"""The HTTP verbs of one SGLang server: token ids in, token ids and log-probabilities out; and its control."""

from __future__ import annotations

import base64
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

# It has a line for every request.
logging.getLogger("httpx").setLevel(logging.WARNING)

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""SGLang's names of what memory holds (`GPU_MEMORY_TYPE_WEIGHTS`, `GPU_MEMORY_TYPE_KV_CACHE`)."""

_CONNECT_SECONDS = 10.0
# SGLang closes connections that were idle for 5 seconds; a request that is sent just then would be lost.
_IDLE_SECONDS = 2.0
# Control requests that must get through while all places for generation are taken.
_SPARE_CONNECTIONS = 8


class ServerLost(ConnectionError):
    """The server did not answer, broke the connection off, or failed; what it was asked may be asked of another."""


class RequestRefused(ValueError):
    """The server refuses what it was asked, and any other would."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One response as the server has it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Mapping[str, Any]
    """SGLang's finish_reason: `type` stop, length or abort (somebody ended it, the tokens until then are here);
    `matched`: the token that stopped it."""
    weight_labels: frozenset[str]
    """Of all weights that generated some of its tokens."""


@dataclass(frozen=True, kw_only=True)
class ServerDescription:
    """What a server says of itself."""

    model_path: str
    weight_label: str
    dtype: str
    version: str
    """Of SGLang."""
    device: str
    tensor: int
    """Tensor-parallel ranks."""
    weight_loaders: tuple[str, ...]
    """Functions that it was started with as --custom-weight-loader."""
    saves_memory: bool
    """Whether it was started with --enable-memory-saver."""


class ServerClient:
    """Talks to one server. Every method raises ServerLost or RequestRefused; use it on one event loop."""

    def __init__(self, url: str, *, max_concurrency: int, control_seconds: float):
        self.url = url
        self._control_seconds = control_seconds
        connections = max_concurrency + _SPARE_CONNECTIONS
        self._http = httpx.AsyncClient(
            base_url=url,
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_IDLE_SECONDS
            ),
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            trust_env=False,  # a proxy of the machine is not for a server beside us
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, rid: str, prompt_ids: Sequence[int], sampling: Mapping[str, Any]) -> Generated:
        """One response; waits as long as it takes, or until it is aborted."""
        answer = await self._ask(
            "POST",
            "/generate",
            {"rid": rid, "input_ids": list(prompt_ids), "sampling_params": dict(sampling), "return_logprob": True},
            seconds=None,
        )
        about = answer["meta_info"]
        pairs = about.get("output_token_logprobs") or []  # none of what was aborted before its first token
        ids = tuple(answer["output_ids"])
        if ids != tuple(token for _, token, *_ in pairs):
            raise ServerLost(f"{self.url}: {rid} has {len(ids)} tokens and log-probabilities of others ({len(pairs)})")
        if any(logprob is None for logprob, *_ in pairs):  # JSON has no NaN
            raise ServerLost(f"{self.url}: {rid} has log-probabilities that are no numbers; its weights are damaged")
        spans = about.get("weight_versions") or []
        return Generated(
            token_ids=ids,
            logprobs=tuple(logprob for logprob, *_ in pairs),
            finish=about["finish_reason"],
            weight_labels=frozenset(str(span["version"]) for span in spans)
            or frozenset([str(about["weight_version"])]),
        )

    async def abort_request(self, rid: str) -> None:
        """Ends a response: who asked for it gets what there is. Nothing happens where the server does not know it."""
        await self._ask("POST", "/abort_request", {"rid": rid})

    async def is_healthy(self, seconds: float) -> bool:
        """Whether the server generates a token, or has generated any, within `seconds`."""
        try:
            response = await self._http.get("/health", timeout=seconds)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def describe(self) -> ServerDescription:
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
        )

    async def weight_label(self) -> str:
        return str((await self._ask("GET", "/model_info"))["weight_version"])

    async def pause_generation(self) -> None:
        """Generation stands still; running requests lose their KV cache and go on with the next weights."""
        await self._ask("POST", "/pause_generation", {"mode": "retract"})

    async def begin_weight_update(self) -> None:
        """Weights may change until `end_update`."""
        await self._ask("POST", "/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        await self._ask("POST", "/end_weight_update", {})

    async def update_weights_from_disk(self, directory: Path) -> None:
        body = {"model_path": str(directory), "load_format": "auto", "flush_cache": False}
        await self._ask("POST", "/update_weights_from_disk", body)

    async def update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str) -> None:
        """payloads: one pickled list of (name, tensor) a tensor-parallel rank."""
        encoded = [base64.b64encode(payload).decode() for payload in payloads]
        body = {"serialized_named_tensors": encoded, "load_format": load_format, "flush_cache": False}
        await self._ask("POST", "/update_weights_from_tensor", body)

    async def init_weights_update_group(self, group: Mapping[str, Any]) -> None:
        await self._ask("POST", "/init_weights_update_group", group)

    async def update_weights_from_distributed(self, tensors: Mapping[str, Any]) -> None:
        await self._ask("POST", "/update_weights_from_distributed", {**tensors, "flush_cache": False})

    async def destroy_weights_update_group(self, name: str) -> None:
        await self._ask("POST", "/destroy_weights_update_group", {"group_name": name})

    async def flush_cache(self) -> None:
        """Forgets the KV of every prefix: it belongs to old weights."""
        await self._ask("POST", "/flush_cache")

    async def freeze_gc(self) -> None:
        """What the server holds by now is never searched again. It asks itself to, but maybe before it listens."""
        with contextlib.suppress(RequestRefused):
            await self._ask("POST", "/freeze_gc")

    async def update_weight_version(self, label: str) -> None:
        await self._ask("POST", "/update_weight_version", {"new_version": label, "abort_all_requests": False})

    async def release_memory_occupation(self, tags: Sequence[str]) -> None:
        """Of a paused server. tags: of WEIGHTS and KV_CACHE, held as yet: SGLang ends where one is not."""
        await self._ask("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory_occupation(self, tags: Sequence[str]) -> None:
        """Memory is there again; what was in it is not. tags: released before."""
        await self._ask("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def continue_generation(self) -> None:
        await self._ask("POST", "/continue_generation", {})

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, seconds: float | None = -1.0
    ) -> Any:
        """seconds: to wait for the answer; None: for ever; negative: as long as control requests may take."""
        timeout = self._control_seconds if seconds is not None and seconds < 0 else seconds
        try:
            response = await self._http.request(
                method, path, json=body, timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS)
            )
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
