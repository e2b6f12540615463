"""Weights reach a real SGLang server by every transport, from trainers in several layouts; and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oreal_megatron.weight_sync.p2p as moving
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.weight_sync.types import PausedServer
from tests.servers.conftest import require_sglang
from tests.servers.test_servers import GREEDY, PROMPTS, assert_as_transformers, assert_greedy, requests_of
from tests.servers.trainer_worker import NUM_TOKENS
from tests.servers.trainer_worker import PROMPTS as PUBLISHED_PROMPTS
from tests.tiny_models import save_tiny
from tests.tiny_servers import RUN, STOP, open_servers

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3000)]

TRANSPORTS = ("direct", "broadcast", "ipc", "disk")
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_parts"
LAYOUTS = {
    "TP1": {"world": 1, "tensor": 1, "pipeline": 1},
    "TP2": {"world": 2, "tensor": 2, "pipeline": 1},
    "PP2": {"world": 2, "tensor": 1, "pipeline": 2},
    "TP2xPP2": {"world": 4, "tensor": 2, "pipeline": 2},
}


def publish_from(layouts, urls, tensor, sources, directory):
    """Runs trainers in `layouts`; checks each publication's tokens against transformers; returns their records."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = {
        "urls": urls,
        "tensor": tensor,
        "sources": [str(source) for source in sources],
        "directory": str(directory),
        "layouts": layouts,
        "transports": TRANSPORTS,
    }
    (directory / "spec.json").write_text(json.dumps(spec))
    output = directory / "output.json"
    command = [sys.executable, "-m", "tests.servers.trainer_worker", str(directory / "spec.json"), str(output)]
    outcome = subprocess.run(
        command, capture_output=True, text=True, timeout=2000, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    records = json.loads(output.read_text())
    for record in records:
        assert_published(record)
    assert [(r["layout"], r["transport"]) for r in records] == [(n, t) for n in layouts for t in TRANSPORTS]
    return records


def assert_published(record):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(record["source"], dtype=torch.float32).eval()
    for prompt, (ids, logprobs) in zip(PUBLISHED_PROMPTS, record["completions"], strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert_greedy(logprobs, ids, expected)
        assert ids[-1] == STOP or len(ids) == NUM_TOKENS
    assert record["report"]["publication/failures"] == 0


@pytest.mark.distributed
def test_every_transport_brings_the_weights_of_a_trainer_of_tp2_x_pp2(servers, tiny_qwen, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen2", tied=False, ffn=80, seed=1)
    layout = {"TP2xPP2": dict(LAYOUTS["TP2xPP2"])}
    records = publish_from(layout, [servers.pool.servers[0].client.url], 1, [tiny_qwen, other], tmp_path / "run")
    whole = sum(p.numel() * 4 for p in servers.policy.parameters())
    assert [record["report"]["publication/bytes"] for record in records] == [whole] * len(TRANSPORTS)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_servers", "tensor", "family", "options"),
    [
        *[(n, t, "qwen2", {"tied": False, "vocabulary": 121}) for n, t in ((1, 1), (2, 1), (1, 2))],
        *[(n, t, "llama", {"tied": True, "vocabulary": 120}) for n, t in ((1, 1), (2, 1), (1, 2))],
    ],
)
def test_every_transport_from_every_layout(num_servers, tensor, family, options, single_process, tmp_path):
    """Biases and a vocabulary that both sides pad; tied embeddings, which two stages hold. At TP2 SGLang pads the
    feed-forward layers on CPU."""
    require_sglang()
    sources = [save_tiny(tmp_path / f"model{seed}", family, seed=seed, **options) for seed in (0, 1)]
    opened = open_servers(single_process, sources[0], tmp_path, num_servers=num_servers, tensor=tensor)
    try:
        opened.engine.publish(0)
        urls = [server.client.url for server in opened.pool.servers]
        layouts = {name: dict(layout) for name, layout in LAYOUTS.items()}
        records = publish_from(layouts, urls, tensor, sources, tmp_path / "run")
    finally:
        opened.engine.close()
    by_transport = {r["transport"]: r["report"]["publication/bytes"] for r in records}
    assert by_transport["direct"] == by_transport["ipc"] <= by_transport["broadcast"]


def test_transport_of_ones_own_brings_the_weights(servers, single_process, tiny_qwen, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    command = ["cp", "-rT", "{source}", "{target}"]
    own = {"path": "copied.Copied", "settings": {"command": command, "target": f"{tmp_path}/copy"}}
    url = servers.pool.servers[0].client.url
    opened = open_servers(single_process, tiny_qwen, tmp_path, urls=[url], transport=own)
    try:
        for version in range(2):
            opened.perturb()
            report = opened.engine.publish(version)
            assert report["publication/failures"] == 0 and report["publication/servers"] == 1
            assert report["publication/bytes"] == sum(p.numel() * 4 for p in opened.policy.parameters())
            assert_as_transformers(opened.generate(requests_of(PROMPTS), GREEDY), opened.written())
    finally:
        opened.engine.close()
    assert (tmp_path / "copy" / "config.json").is_file()


def test_a_bucket_that_arrives_corrupted_is_caught_and_sent_again(servers, monkeypatch):
    real, is_first = moving.pack, True

    def corrupted(run, shards, flat):
        nonlocal is_first
        real(run, shards, flat)
        if is_first:
            flat.view(torch.int32)[flat.numel() // 2] ^= 1
            is_first = False

    servers.engine.publish(servers.engine.weight_version + 1)
    monkeypatch.setattr(moving, "pack", corrupted)
    report = servers.engine.publish(servers.engine.weight_version + 1)
    assert report["publication/failures"] == 1 and report["publication/servers"] == 1
    assert_as_transformers(servers.generate(requests_of(PROMPTS), GREEDY), servers.written())


def test_changes_alone_reach_a_server_and_all_weights_after_a_miss(
    servers, single_process, tiny_qwen, tmp_path, monkeypatch
):
    url = servers.pool.servers[0].client.url
    opened = open_servers(single_process, tiny_qwen, tmp_path, urls=[url], full_every=4)
    sent = []

    def publish_changed() -> dict[str, float]:
        with torch.no_grad():
            for parameter in opened.policy.parameters():
                parameter.view(-1)[::50] += 0.1
        report = opened.engine.publish(len(sent))
        assert report["publication/servers"] == 1
        assert_as_transformers(opened.generate(requests_of(PROMPTS), GREEDY), opened.written())
        sent.append(report["publication/bytes"])
        return report

    try:
        opened.perturb()
        for _ in range(6):
            assert publish_changed()["publication/failures"] == 0
        whole = sum(p.numel() * 4 for p in opened.policy.parameters())
        assert [num_bytes == whole for num_bytes in sent] == [True, False, False, False, True, False]
        assert max(sent[1:4] + sent[5:]) < whole / 10
        with monkeypatch.context() as once:
            encode = moving.encode_changes
            once.setattr(moving, "encode_changes", lambda before, after: encode(before, before))
            assert publish_changed()["publication/failures"] == 1
        assert whole < sent[-1] < 1.1 * whole
        assert publish_changed()["publication/failures"] == 0 and sent[-1] < whole / 10
    finally:
        opened.engine.close()
    # The worker has left the group of the shared engine, whose next publication sends twice.
    servers.engine.publish(servers.engine.weight_version + 1)


def test_a_server_that_kept_its_old_weights_is_caught_by_the_audit(servers, monkeypatch):
    """A transport reports that it has sent, and has not; only the audit can notice."""
    from oreal_megatron.weight_sync.types import TransferResult

    transport = servers.engine.publisher._transport
    servers.perturb()
    with monkeypatch.context() as once:
        once.setattr(transport, "send", lambda paused: once.undo() or TransferResult())
        report = servers.engine.publish(servers.engine.weight_version + 1)
    assert report["publication/failures"] == 1 and report["publication/servers"] == 1
    assert_as_transformers(servers.generate(requests_of(PROMPTS), GREEDY), servers.written())


def test_a_stale_server_that_no_audit_looks_at_is_caught_by_the_mismatch(servers, tiny_qwen, tmp_path):
    """Above the first threshold the run says so, above the second it ends before it trains on such rollouts."""
    url = servers.pool.servers[0].client.url
    (tmp_path / "run/servers").mkdir(parents=True)
    (tmp_path / "run/servers/run_id").write_text(RUN)  # the run whose weights the server has
    command = [sys.executable, "-m", "tests.servers.stale_worker", url, str(tiny_qwen), str(tmp_path / "run")]
    outcome = subprocess.run(
        [*command, str(tmp_path / "output.json")],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    found = json.loads((tmp_path / "output.json").read_text())
    assert found["healthy"] < 1e-5 and found["stale"] > 1e-3
    assert not [line for line in found["said_before"] if "differ from the rollouts'" in line]
    assert any(f"by {found['stale']:.3g} nats in the mean (rollout.mismatch.warn = 0.001)" in s for s in found["said"])
    assert f"more than rollout.mismatch.stop = {found['stale'] / 10:g}" in found["error"]
    assert "step 3: " in found["error"] and "no update was made" in found["error"] and found["is_unchanged"]


def test_a_server_without_the_weight_loader_is_refused_with_the_option(servers, single_process, tiny_qwen, tmp_path):
    url = servers.pool.servers[0].client.url
    other = open_servers(single_process, tiny_qwen, tmp_path, urls=(url,))
    other.pool._settings = replace(
        other.pool._settings, launcher=replace(other.pool._settings.launcher, weight_loader="other.load")
    )
    with pytest.raises(NoServerError, match=r"was started without --custom-weight-loader other\.load"):
        other.engine.publish(0)
    other.engine.close()
    other = open_servers(single_process, tiny_qwen, tmp_path, urls=(url,), tensor=2)
    with pytest.raises(NoServerError, match=r"has tensor 1, rollout\.sglang\.tensor is 2"):
        other.engine.publish(0)
    other.engine.close()


def test_server_killed_mid_publication_comes_back_in_sync(servers, monkeypatch):
    """Killed when the trainer begins to send to it. The publication ends; the next prompts wait for the new server."""
    kill_mid_publication(servers, monkeypatch, servers.pool.servers[0])
    assert_as_transformers(servers.generate(requests_of(PROMPTS), GREEDY), servers.written())
    assert servers.pool.servers[0].is_up


@pytest.mark.parametrize(
    "transport", ["direct", *(pytest.param(name, marks=pytest.mark.slow) for name in TRANSPORTS[1:])]
)
def test_server_killed_mid_publication_leaves_the_other_updated(
    transport, single_process, tiny_qwen, tmp_path, monkeypatch
):
    require_sglang()
    opened = open_servers(single_process, tiny_qwen, tmp_path, num_servers=2, transport=transport)
    try:
        opened.engine.publish(0)
        report = kill_mid_publication(opened, monkeypatch, opened.pool.servers[1])
        assert report["publication/servers"] == 1
        assert_as_transformers(opened.generate(requests_of(PROMPTS), GREEDY), opened.written())
        deadline = time.monotonic() + 900
        while not opened.pool.servers[1].is_up:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        opened.perturb()
        assert opened.engine.publish(2)["publication/servers"] == 2
    finally:
        opened.engine.close()


def kill_mid_publication(servers, monkeypatch, server):
    """Publishes, and kills `server` between the request to load and the loading."""
    pid = server.process.pid
    with monkeypatch.context() as patch:
        for name in (
            "update_weights_from_tensor",
            "update_weights_from_disk",
            "update_weights_from_distributed",
        ):
            patch.setattr(PausedServer, name, killing(getattr(PausedServer, name), server.client.url, pid, patch))
        servers.perturb()
        start = time.monotonic()
        report = servers.engine.publish(servers.engine.weight_version + 1)
        print(f"the publication ended after {time.monotonic() - start:.2f} s: {report}")
    assert any("does not have the weights" in line for line in servers.said)
    return report


def killing(real, url, pid, patch):
    def load(self, *arguments):
        answer = real(self, *arguments)
        if self.name == url:
            patch.undo()
            os.killpg(pid, signal.SIGKILL)
        return answer

    return load
