"""A real SGLang server: what it generates, with which weights, and what happens when it is killed, frozen or stale."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oreal_megatron.config import SamplingConfig
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.servers.server_process import ServerStartError
from oreal_megatron.types import FinishReason, GenerationRequest, WeightSpan
from tests.run_processes import wait_until
from tests.tiny_models import LOGPROB_ROUNDING, save_tiny
from tests.tiny_servers import STOP, open_servers

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=24)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=200)
PROMPTS = ((5, 6, 8, 9), (100, 101, 102), (17,), tuple(range(20, 60)))

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]


def requests_of(prompts, max_new_tokens=24):
    return [GenerationRequest(prompt_ids=ids, seed=i, max_new_tokens=max_new_tokens) for i, ids in enumerate(prompts)]


def model_of(directory):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def teacher_forced(model, prompt, completion):
    """transformers' log-probabilities where each token of the response was drawn."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def assert_greedy(logprobs, ids, expected):
    """Of every position's `expected` log-probabilities (tokens, vocabulary), that of its token is none's smaller."""
    chosen = expected.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
    for found in (chosen, torch.tensor(logprobs)):
        torch.testing.assert_close(found, expected.max(-1).values, atol=LOGPROB_ROUNDING, rtol=0)


def assert_as_transformers(completions, directory):
    """Greedy tokens and their log-probabilities are transformers' on the weights in `directory`."""
    model = model_of(directory)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = list(completion.token_ids)
        assert_greedy(completion.logprobs, ids, teacher_forced(model, prompt, completion))
        assert completion.finish_reason is (FinishReason.STOP if ids[-1] == STOP else FinishReason.LENGTH)
        assert STOP not in ids[:-1] and (ids[-1] == STOP or len(ids) == 24)


def test_greedy_tokens_are_those_of_the_published_weights(servers):
    before, version = servers.generate(requests_of(PROMPTS), GREEDY), servers.engine.weight_version
    assert_as_transformers(before, servers.written())
    pid = servers.pool.servers[0].process.pid
    servers.perturb()
    report = servers.engine.publish(version + 1)
    after = servers.generate(requests_of(PROMPTS), GREEDY)
    assert servers.pool.servers[0].process.pid == pid  # the same server took them
    for number, completions in ((version, before), (version + 1, after)):
        assert all(c.weight_spans == (WeightSpan(version=number, start=0, end=len(c.token_ids)),) for c in completions)
    assert [c.token_ids for c in before] != [c.token_ids for c in after]
    assert report["publication/servers"] == 1 and report["publication/failures"] == 0
    assert report["publication/bytes"] == sum(p.numel() * 4 for p in servers.policy.parameters())
    assert_as_transformers(after, servers.written())


def test_a_server_with_other_weights_gets_none_of_the_prompts_before_ours(servers, tiny_qwen):
    """Another client loads the first weights into it."""
    servers.engine._loop.run(_plant(servers.pool.servers[0].client, tiny_qwen)).result(120)
    assert_as_transformers(servers.generate(requests_of(PROMPTS), GREEDY), servers.written())


async def _plant(client, directory):
    await client.update_weights_from_disk(directory)
    await client.flush_cache()
    await client.update_weight_version("stale")


def test_server_of_a_live_run_is_refused_to_another_run(servers, single_process, tiny_qwen, tmp_path):
    url = servers.pool.servers[0].client.url
    other = open_servers(single_process, tiny_qwen, tmp_path, urls=(url,), run="other")
    try:
        with pytest.raises(NoServerError, match="of another run, which may be live"):
            other.engine.publish(5)
        ours = servers.generate(requests_of(PROMPTS), GREEDY)
        assert_as_transformers(ours, servers.written())
    finally:
        other.engine.close()
    assert servers.pool.servers[0].process.exit_code is None  # a server that we attached to is not ours to end


def test_a_response_that_is_broken_off_goes_on_with_other_weights(servers):
    """Every token is greedy under the weights that its span names, with the log-probability that it had under them."""
    prompts = [(40 + i, 6, 8) for i in range(14)]
    asked = [
        GenerationRequest(prompt_ids=prompt, seed=0, max_new_tokens=4 if i < 2 else 230)
        for i, prompt in enumerate(prompts)
    ]
    first = servers.generate(asked, GREEDY, num_enough=2)
    partial = [completion for completion in first if completion.finish_reason is None and completion.token_ids]
    assert partial and all(len(c.token_ids) == len(c.logprobs) < 230 and STOP not in c.token_ids for c in partial)
    version = servers.engine.weight_version
    models = {version: model_of(servers.written())}
    servers.perturb()
    servers.engine.publish(version + 1)
    models[version + 1] = model_of(servers.written())
    second = servers.generate([replace(r, partial=c) for r, c in zip(asked, first, strict=True)], GREEDY)
    for prompt, part, whole in zip(prompts, first, second, strict=True):
        if part not in partial:
            assert whole == part or not part.token_ids  # what was finished is the answer
            continue
        cut, end = len(part.token_ids), len(whole.token_ids)
        assert whole.token_ids[:cut] == part.token_ids and whole.logprobs[:cut] == part.logprobs
        assert whole.weight_spans == (
            WeightSpan(version=version, start=0, end=cut),
            WeightSpan(version=version + 1, start=cut, end=end),
        )
        assert end == 230 or whole.token_ids[-1] == STOP
        for span in whole.weight_spans:
            logprobs = teacher_forced(models[span.version], prompt, whole)
            generated = slice(span.start, span.end)
            assert_greedy(whole.logprobs[generated], whole.token_ids[generated], logprobs[generated])


def test_a_response_ends_at_the_stop_token_and_keeps_it(servers):
    completions = servers.generate(requests_of([(5, 6, 8)] * 48, 200), SAMPLED)
    stopped = [c for c in completions if c.finish_reason is FinishReason.STOP]
    assert stopped and all(c.token_ids[-1] == STOP and STOP not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == 200 for c in completions if c.finish_reason is FinishReason.LENGTH)
    assert len({c.token_ids for c in completions}) > 40  # samples of one prompt differ


def test_a_prompt_may_fill_the_context(servers):
    (completion,) = servers.generate(requests_of([(5,) * 255], 1), GREEDY)
    assert len(completion.token_ids) == 1


def test_another_model_behind_a_url_is_refused_with_both_fingerprints(servers, single_process, tmp_path):
    larger = save_tiny(tmp_path / "larger", "qwen2", tied=False, ffn=80, num_layers=3)
    other = open_servers(single_process, larger, tmp_path, urls=(servers.pool.servers[0].client.url,))
    with pytest.raises(NoServerError, match=r"fingerprint \w{12}, the policy \w{12}; num_layers 2 instead of 3"):
        other.engine.publish(0)
    other.engine.close()


def test_a_url_that_accepts_and_never_answers_is_refused(single_process, tiny_qwen, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        other = open_servers(single_process, tiny_qwen, tmp_path, urls=(url,), startup_seconds=2.0)
        with pytest.raises(NoServerError, match=f"{url} gave no answer in 2 seconds"):
            other.engine.publish(0)
        other.engine.close()


def test_a_taken_port_is_named(single_process, tiny_qwen, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = open_servers(single_process, tiny_qwen, tmp_path, port=port)
        with pytest.raises(ServerStartError, match=f"rollout.sglang.port = {port}: server 0 cannot listen at"):
            other.engine.publish(0)
        other.engine.close()


def test_a_server_ends_when_the_process_that_started_it_is_killed(tmp_path):
    """With another command in the place of SGLang."""
    script = (
        "import time; from pathlib import Path; from oreal_megatron.servers.server_process import ServerProcess\n"
        f"server = ServerProcess(['sleep', '600'], {{'PATH': '/usr/bin:/bin'}}, Path({str(tmp_path / 'log')!r}))\n"
        "print(server.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    wait_until(lambda: "sleep" in Path(f"/proc/{pid}/cmdline").read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(pid))


def test_server_killed_mid_generation_costs_no_response(servers):
    kill_mid_generation(servers, signal.SIGKILL)


@pytest.mark.slow
def test_server_frozen_mid_generation_costs_no_response(servers):
    """Stopped by a signal it still accepts connections, and answers nothing."""
    kill_mid_generation(servers, signal.SIGSTOP)


def kill_mid_generation(servers, how):
    server, retries = servers.pool.servers[0], servers.pool.num_retries
    pid = server.process.pid

    def strike():
        time.sleep(1.0)
        os.killpg(pid, how)

    striking = threading.Thread(target=strike)
    striking.start()
    prompts = [(5 + i, 6, 8) for i in range(64)]
    completions = servers.generate(requests_of(prompts, 200), SAMPLED)
    striking.join()
    assert len(completions) == 64 and all(c.token_ids and len(c.token_ids) == len(c.logprobs) for c in completions)
    assert servers.pool.num_retries > retries and server.process.pid != pid
    assert any("lost" in line for line in servers.said)
    assert_as_transformers(servers.generate(requests_of(PROMPTS), GREEDY), servers.written())
    wait_until(lambda: not is_running(pid))


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
