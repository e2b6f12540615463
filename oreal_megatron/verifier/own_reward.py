"""Grades of a reward function of a user's own, in place of the verifier's stages."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from oreal_megatron.types import Grade, GradeRequest, Verdict

# Distance from 0 or 1 at which a sum of shares counts as that.
_ROUNDING = 1e-6
STAGE = "reward"
"""Stage of these grades."""


def grades_of(
    reward: Callable[..., Any], requests: Sequence[GradeRequest], *, seconds: float, concurrency: int
) -> list[Grade]:
    """Returns a grade for each request, in order. A call that raises or takes too long is UNDECIDED.

    May be called inside and outside of an event loop.

    reward: is called with question, gold_answer, response and stopped, and returns a reward or an awaitable of one. A
    function that is not async runs in a thread, which goes on after its time. seconds: time limit of a call.
    concurrency: calls at a time.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward") as thread:
        return thread.submit(asyncio.run, _grades_of(reward, requests, seconds, concurrency)).result()


async def _grades_of(
    reward: Callable[..., Any], requests: Sequence[GradeRequest], seconds: float, concurrency: int
) -> list[Grade]:
    places = asyncio.Semaphore(concurrency)

    async def grade(request: GradeRequest) -> Grade:
        async with places:
            start = time.perf_counter()
            try:
                async with asyncio.timeout(seconds):
                    found = await _called(reward, request)
            except TimeoutError:
                verdict, credit, reason = Verdict.UNDECIDED, None, f"no reward within {seconds:g} s"
            except Exception as error:  # whatever the user's function raises
                verdict, credit, reason = Verdict.UNDECIDED, None, f"{type(error).__name__}: {error}"
            else:
                verdict, credit, reason = _read(found)
            return Grade(
                verdict=verdict, credit=credit, reason=reason, stage=STAGE, seconds=time.perf_counter() - start
            )

    return list(await asyncio.gather(*map(grade, requests)))


async def _called(reward: Callable[..., Any], request: GradeRequest) -> Any:
    if inspect.iscoroutinefunction(inspect.unwrap(reward)):
        return await reward(**vars(request))
    found = await _in_thread(lambda: reward(**vars(request)))
    return await found if inspect.isawaitable(found) else found


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Returns what a function returns in a thread that neither this call's end nor the process waits for.

    `asyncio.to_thread` would wait at the end of the loop for a function that hangs.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def finish(set_it: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the call took too long
            loop.call_soon_threadsafe(lambda: None if result.done() else set_it(value))

    def run() -> None:
        try:
            value = function()
        except Exception as error:  # whatever the user's function raises
            finish(result.set_exception, error)
        else:
            finish(result.set_result, value)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return await result


def _read(found: Any) -> tuple[Verdict, float | None, str]:
    """Returns verdict, credit and reason of what a reward function returned: a bool, a number in [0, 1], or None."""
    if found is None:
        return Verdict.UNDECIDED, None, "the reward is None"
    if hasattr(found, "item"):  # a number of numpy or torch
        found = found.item()
    if isinstance(found, bool):
        return (Verdict.CORRECT if found else Verdict.INCORRECT), None, f"the reward is {found}"
    if isinstance(found, int | float) and -_ROUNDING <= found <= 1 + _ROUNDING:
        credit = min(max(float(found), 0.0), 1.0)
        credit = round(credit) if abs(credit - round(credit)) <= _ROUNDING else credit
        return (Verdict.CORRECT if credit == 1 else Verdict.INCORRECT), float(credit), f"the reward is {found:g}"
    return Verdict.UNDECIDED, None, f"the reward is {found!r}, no number in [0, 1], bool or None"
