"""Requests from pending to complete, and the completions of partial responses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.servers.client import Generated, ServerLost
from oreal_megatron.servers.request_queue import NOTHING, NoServerError, RequestQueue
from oreal_megatron.types import Completion, FinishReason, GenerationRequest, WeightSpan
from tests.fake_sglang import STOP

SAMPLING = SamplingConfig(temperature=0.5, top_p=0.9, max_new_tokens=8)
PARTIAL = Completion(
    token_ids=(1, 2),
    logprobs=(-1.0, -2.0),
    finish_reason=None,
    weight_spans=(WeightSpan(version=3, start=0, end=2),),
)
DONE = replace(PARTIAL, token_ids=(1, STOP), finish_reason=FinishReason.STOP)


def request(partial=None):
    return GenerationRequest(prompt_ids=(5, 6), seed=11, max_new_tokens=8, partial=partial)


def test_token_of_the_request_ends_its_response():
    queue, _ = queue_of(replace(request(), stop_token_ids=(9,)))
    assert queue.options(0, STOP)["stop_token_ids"] == [STOP, 9]
    completion = queue.completion(0, generated(3, 9, finish="stop"), versions=[(4, 2)], stop_token_id=STOP)
    assert completion.finish_reason is FinishReason.STOP and completion.token_ids == (3, 9)


def queue_of(*requests):
    found = {}
    return RequestQueue(requests, SAMPLING, found.__setitem__), found


def generated(*token_ids, finish="length"):
    return Generated(
        token_ids=token_ids,
        logprobs=tuple(-0.1 * token for token in token_ids),
        finish={"type": finish},
        weight_labels=(("4-a", len(token_ids)),),
    )


def test_queue_without_requests_is_finished():
    assert queue_of()[0].finished.is_set()


def test_finished_partial_is_the_completion_and_is_not_sent():
    queue, found = queue_of(request(DONE), request())
    assert found == {0: DONE} and queue.pending == {(5, 6): [1]} and not queue.finished.is_set()
    queue.complete(1, DONE)
    assert queue.finished.is_set()


def test_requests_that_come_back_are_pending_in_the_order_in_which_they_were_asked():
    queue, _ = queue_of(*(request() for _ in range(4)))
    taken = [queue.take((5, 6)) for _ in range(3)]
    queue.put_back(taken[2], ServerLost("gone"))
    queue.untake(taken[0])
    queue.put_back(taken[1], ServerLost("gone"))
    assert queue.pending == {(5, 6): [0, 1, 2, 3]}


def test_open_queue_takes_requests_until_its_end():
    found = {}
    queue = RequestQueue((), SAMPLING, found.__setitem__, is_open=True)
    assert not queue.finished.is_set()
    queue.add([request(DONE), request(PARTIAL)])
    assert found == {0: DONE} and queue.pending == {(5, 6): [1]}
    queue.complete(queue.take((5, 6)), DONE)
    queue.add([request(PARTIAL)])
    assert not queue.finished.is_set()
    queue.end()
    assert found == {0: DONE, 1: DONE, 2: PARTIAL} and queue.finished.is_set()
    queue.add([request(PARTIAL)])
    assert found[3] == PARTIAL and not queue.pending


def test_options_ask_for_the_rest_of_a_partial_response():
    queue, _ = queue_of(request(), request(PARTIAL))
    assert queue.input_ids(0) == (5, 6) and queue.input_ids(1) == (5, 6, 1, 2)
    options = [queue.options(index, STOP) for index in (0, 1)]
    assert [o["max_new_tokens"] for o in options] == [8, 6]
    assert options[0]["temperature"] == 0.5 and options[0]["top_p"] == 0.9 and options[0]["sampling_seed"] == 11
    assert options[0]["stop_token_ids"] == [STOP]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (generated(3, 4, 5, 6, 8, 9), FinishReason.LENGTH),
        (generated(3, STOP, finish="stop"), FinishReason.STOP),
        (generated(3, STOP, finish="abort"), FinishReason.STOP),
        (generated(3, finish="abort"), None),
        (generated(finish="abort"), None),
    ],
)
def test_completion_extends_a_partial_response(answer, reason):
    queue, _ = queue_of(request(PARTIAL))
    completion = queue.completion(0, answer, versions=[(4, len(answer.token_ids))], stop_token_id=STOP)
    end = 2 + len(answer.token_ids)
    new = (WeightSpan(version=4, start=2, end=end),) if answer.token_ids else ()
    assert completion.token_ids == (1, 2, *answer.token_ids) and completion.finish_reason is reason
    assert completion.logprobs == (-1.0, -2.0, *answer.logprobs)
    assert completion.weight_spans == (*PARTIAL.weight_spans, *new)


def test_completion_under_the_same_weights_has_one_span():
    queue, _ = queue_of(request(PARTIAL))
    completion = queue.completion(0, generated(3, finish="abort"), versions=[(3, 1)], stop_token_id=STOP)
    assert completion.weight_spans == (WeightSpan(version=3, start=0, end=3),)


def test_request_that_is_lost_four_times_raises():
    queue, _ = queue_of(request())
    for _ in range(3):
        queue.put_back(queue.take((5, 6)), ServerLost("gone"))
    with pytest.raises(NoServerError, match=r"2 tokens was lost 4 times.*\[5, 6\].*gone"):
        queue.put_back(queue.take((5, 6)), ServerLost("gone"))


def test_end_completes_pending_requests_with_what_they_have():
    queue, found = queue_of(request(), request(PARTIAL), request(PARTIAL))
    at_server = queue.take((5, 6))
    queue.end()
    assert found == {1: PARTIAL, 2: PARTIAL} and not queue.finished.is_set()
    queue.put_back(at_server, ServerLost("gone"))
    assert found[0] == NOTHING and queue.finished.is_set()


def test_error_names_every_failed_server():
    error = NoServerError.of({"http://a": "died", "http://b": "another model"}, 3)
    assert "2 of 3" in str(error) and "http://a: died" in str(error) and "http://b: another model" in str(error)


def test_expected_tokens_follow_the_answers_of_the_call():
    queue, _ = queue_of(request(), request(PARTIAL))
    assert [queue.expected_tokens(index) for index in (0, 1)] == [2 + 4, 4 + 3]
    queue.completion(0, generated(3, STOP, finish="stop"), versions=[(4, 2)], stop_token_id=STOP)
    assert [queue.expected_tokens(index) for index in (0, 1)] == [2 + 2, 4 + 2]


def test_expected_tokens_are_those_of_the_prompt_where_they_are_known():
    queue, _ = queue_of(replace(request(), expected_tokens=3.0), replace(request(PARTIAL), expected_tokens=100.0))
    queue.completion(0, generated(3), versions=[(4, 1)], stop_token_id=STOP)
    assert [queue.expected_tokens(index) for index in (0, 1)] == [2 + 3, 4 + 6]
