"""Requests to OpenAI-compatible chat endpoints: several in flight, with retries, in turn over the endpoints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from oreal_megatron.verifier.config import JudgeConfig
from oreal_megatron.verifier.judge.endpoints import Endpoints

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class ChatFailure(Exception):
    """Raised for a request without a usable reply; `retry` says whether a repetition may give one."""

    def __init__(self, reason: str, retry: bool = True) -> None:
        super().__init__(reason)
        self.retry = retry


def chat_request(
    model: str, messages: Sequence[Mapping[str, str]], *, max_tokens: int, json_schema: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the body of a request for a greedy reply. json_schema: form of the reply that the server has to keep."""
    request: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": max_tokens,
    }
    if json_schema is not None:
        request["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    return request


def clean(text: str) -> str:
    """Returns the text as valid UTF-8, without control characters and special tokens of chat templates."""
    text = text.encode("utf-8", "replace").decode()
    text = "".join(char for char in text if char >= " " or char in "\n\t")
    return text.replace("<|", "< |").replace("|>", "| >")


class ChatClient:
    """Asks the endpoints of a configuration, and remembers which of them fail."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._endpoints = Endpoints(config.endpoints, config.breaker_failures, config.breaker_seconds)

    def replies(self, requests: Sequence[Mapping[str, Any]], parse: Callable[[object], T]) -> list[T | ChatFailure]:
        """Returns for each request the parsed reply, or the failure of its last attempt.

        May be called inside and outside of an event loop. parse: takes the content of a reply; raises ChatFailure.
        """
        if not requests:
            return []
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat") as thread:
            return thread.submit(asyncio.run, self._all(requests, parse)).result()

    async def _all(self, requests: Sequence[Mapping[str, Any]], parse: Callable[[object], T]) -> list[T | ChatFailure]:
        import httpx

        config = self._config
        turn = asyncio.Semaphore(config.max_concurrency)
        limits = httpx.Limits(max_connections=config.max_concurrency)
        token = os.environ.get(config.api_key_env) if config.api_key_env else None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # The proxies of the environment are for hosts outside of the cluster; the servers run inside.
        async with httpx.AsyncClient(
            timeout=config.timeout_seconds, limits=limits, headers=headers, trust_env=False
        ) as client:
            return await asyncio.gather(*(self._one(client, turn, request, parse) for request in requests))

    async def _one(
        self,
        client: httpx.AsyncClient,
        turn: asyncio.Semaphore,
        request: Mapping[str, Any],
        parse: Callable[[object], T],
    ) -> T | ChatFailure:
        async with turn:
            failure = ChatFailure("no endpoint is available")
            for attempt in range(self._config.max_attempts):
                url = self._endpoints.pick()
                if url is None:
                    break
                try:
                    reply = parse(await self._content(client, url, request))
                except ChatFailure as error:
                    self._endpoints.failed(url)
                    failure = ChatFailure(f"{url}: {error}")
                    if not error.retry:
                        break
                    if attempt + 1 < self._config.max_attempts:
                        await asyncio.sleep(self._config.backoff_seconds * 2**attempt)
                else:
                    self._endpoints.succeeded(url)
                    return reply
            return failure

    async def _content(self, client: httpx.AsyncClient, url: str, request: Mapping[str, Any]) -> object:
        """Returns the content of an endpoint's reply. Raises ChatFailure where there is none."""
        import httpx

        try:
            # The client's own limits hold for one read; this one holds for the whole request.
            async with asyncio.timeout(self._config.timeout_seconds):
                response = await client.post(f"{url}/chat/completions", json=request)
        except (TimeoutError, httpx.TimeoutException):
            raise ChatFailure(f"no reply within {self._config.timeout_seconds:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            raise ChatFailure(f"{type(error).__name__}: {error}") from None
        if response.status_code != 200:
            is_transient = response.status_code in (408, 409, 425, 429) or response.status_code >= 500
            raise ChatFailure(f"HTTP {response.status_code}: {response.text[:80]!r}", retry=is_transient)
        try:
            return response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ChatFailure(f"not a chat completion: {response.text[:80]!r}") from None
