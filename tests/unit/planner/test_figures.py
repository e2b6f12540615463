"""Measured figures take the place of assumed ones: what is read, what is refused, and what a plan makes of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from oreal_megatron.cli.doctor import measure
from oreal_megatron.cli.planning import planned_geometry
from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError
from oreal_megatron.conversion.huggingface import served_config
from oreal_megatron.planner import hardware
from oreal_megatron.planner.figures import Figures, ServerFigures, read_figures
from oreal_megatron.planner.hardware import device_named, with_figures
from oreal_megatron.planner.memory import KvCache
from oreal_megatron.planner.sizes import Sizes, num_parameters
from oreal_megatron.planner.step_time import assumed_workload, phase_seconds
from oreal_megatron.planner.tables import sources
from oreal_megatron.rollout.token_time import time_tokens, token_seconds
from oreal_megatron.servers.client import ServerClient, ServerLost
from oreal_megatron.weight_sync.sglang_layout import LOADER
from tests.fake_sglang import fake_servers

CONFIG = validated(composed(["experiment=arithmetic_sglang"]))
GEOMETRY = planned_geometry(CONFIG)
KV = KvCache(where="server", num_holders=1, tokens=16384, sequences_at_limit=128, bytes_per_token=256)
MEASURED = {
    "device": "cpu",
    "device_name": "CPU",
    "matrix_flops": 7.0e10,
    "memory_bytes_per_second": 9.0e9,
    "node_bytes_per_second": 1.0e9,
    "link_bytes_per_second": None,
    "server": {
        "parameters": num_parameters(GEOMETRY), "tensor": 1, "dtype": "float32", "context_tokens": 200,
        "token_seconds": {1: 0.002, 32: 0.01},
    },
}  # fmt: skip


def written(tmp_path, **changes):
    path = tmp_path / "figures.yaml"
    path.write_text(yaml.safe_dump({**MEASURED, **changes}))
    return path


def test_token_time_is_linear_between_the_measured_batches_and_beyond():
    server = ServerFigures(**MEASURED["server"])
    assert [server.seconds_at(n) for n in (0.5, 1, 16.5, 32)] == pytest.approx([0.002, 0.002, 0.006, 0.01])
    assert server.seconds_at(63) == pytest.approx(0.018)
    falling = server.model_copy(update={"token_seconds": {1: 0.002, 32: 0.001}})  # noise
    assert falling.seconds_at(100) == 0.001


def test_mistyped_path_is_neither_a_file_nor_a_run(tmp_path):
    with pytest.raises(ValueError, match="neither a file of figures nor the directory of a run"):
        read_figures(tmp_path / "run", CONFIG, GEOMETRY)


def test_plan_takes_measured_figures_and_names_their_source(tmp_path):
    figures = read_figures(written(tmp_path), CONFIG, GEOMETRY)
    sizes, work = Sizes(CONFIG, GEOMETRY, 1), assumed_workload(CONFIG)
    sheet = device_named("cpu", sharing=1)
    assert phase_seconds(sizes, sheet, KV, work) is None
    device = with_figures(sheet, figures)
    assert device.flops * hardware.MATRIX_SHARE == pytest.approx(7e10)
    assert device.link * hardware.LINK_SHARE == pytest.approx(1e9)
    seconds = phase_seconds(sizes, device, KV, work, figures.server)
    twice = with_figures(sheet, figures.model_copy(update={"matrix_flops": 1.4e11}))
    faster = phase_seconds(sizes, twice, KV, work, figures.server)
    assert faster["train policy"] == pytest.approx(seconds["train policy"] / 2)
    slow = figures.server.model_copy(update={"token_seconds": {1: 1.0}})
    # Responses beyond rollout.sglang.max_concurrency wait for a place.
    bulk = work.rollouts / CONFIG.rollout.sglang.max_concurrency * work.mean_response_tokens
    generate = phase_seconds(sizes, device, KV, work, slow)["generate"]
    assert bulk * 0.98 < generate < bulk + work.max_response_tokens
    lines = "\n".join(sources(SimpleNamespace(figures=figures, memory=SimpleNamespace(device=device), sizes=sizes)))
    assert "0.07 TFLOP/s (measured): training 57%" in lines and "2 ms at 1, 10 ms at 32 responses" in lines
    assert "8 Gb/s within a node (measured)" in lines


def test_figures_of_one_node_keep_the_data_sheets_link():
    figures = Figures(**{**MEASURED, "device": "h100_80gb"})
    sheet = device_named("h100_80gb", sharing=1)
    device = with_figures(sheet, figures)
    assert device.link == sheet.link and device.fp8_flops / device.flops == pytest.approx(sheet.fp8_flops / sheet.flops)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix_flops": "fast"}, r"figures\.yaml\.matrix_flops = 'fast'"),
        ({"matrix_flops": -1.0}, "matrix_flops = -1.0: Input should be greater than 0"),
        ({"matrix_flop": 1.0}, "matrix_flop = 1.0: There is no such key. Did you mean `matrix_flops`"),
        ({"server": {**MEASURED["server"], "token_seconds": {}}}, "token_seconds"),
        ({"device": "h100_80gb"}, "device is h100_80gb .* resources.device is cpu"),
        ({"server": {**MEASURED["server"], "tensor": 2}}, "server.tensor is 2, and the plan has 1"),
        ({"server": {**MEASURED["server"], "parameters": 7}}, "server.parameters is 7, and the plan has"),
    ],
)
def test_wrong_figures_are_refused_with_key_and_remedy(tmp_path, changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        read_figures(written(tmp_path, **changes), CONFIG, GEOMETRY)


@pytest.mark.parametrize("content", ["{unclosed", "- a list", ""])
def test_file_that_holds_no_figures_is_refused(tmp_path, content):
    path = tmp_path / "figures.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"figures\.yaml"):
        read_figures(path, CONFIG, GEOMETRY)


def test_server_that_ends_responses_early_is_no_measurement(tmp_path):
    with fake_servers(tmp_path) as fakes:
        client = ServerClient(fakes.server(stop_after=5).url, max_concurrency=1, control_seconds=5, health_seconds=5)
        with pytest.raises(ValueError, match="ended a response after 6 of 16 tokens"):
            fakes.run(token_seconds(client, [1], vocab_size=50, max_sequence_length=4096))


def test_server_that_ends_while_it_is_timed_is_an_error(tmp_path):
    with fake_servers(tmp_path) as fakes:
        fake = fakes.server()
        fake.break_("/generate", "drop")
        client = ServerClient(fake.url, max_concurrency=1, control_seconds=5, health_seconds=5)
        with pytest.raises(ServerLost, match="/generate"):
            fakes.run(token_seconds(client, [1], vocab_size=50, max_sequence_length=4096))


@pytest.fixture
def served(tmp_path):
    """A fake server of CONFIG's model, and the fake servers it belongs to."""
    limit = CONFIG.model.max_sequence_length
    model = served_config(None, GEOMETRY, dtype="float32", fp8=False, max_positions=limit, stop_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps(model))
    with fake_servers(tmp_path) as fakes:
        info = {"model_path": str(tmp_path), "custom_weight_loader": [LOADER]}
        yield fakes.server(token_seconds=0.005, info=info), fakes


def test_server_that_does_not_fit_or_does_not_answer_is_not_timed(served, tmp_path):
    fake, fakes = served
    options = {"dtype": "float32", "max_sequence_length": CONFIG.model.max_sequence_length, "model_path": None}
    options |= {"url": fake.url, "directory": tmp_path, "progress": lambda note: None}
    fake.info["tp_size"] = 2
    with pytest.raises(ValueError, match=r"has tensor 2, rollout\.sglang\.tensor is 1"):
        time_tokens(CONFIG.rollout.sglang, GEOMETRY, **options)
    wider = GEOMETRY.model_copy(update={"hidden_size": 2 * GEOMETRY.hidden_size})
    with pytest.raises(ValueError, match=r"serves another model.*hidden_size"):
        time_tokens(CONFIG.rollout.sglang, wider, **options)
    fakes.kill(fake)
    with pytest.raises(ServerLost, match="/model_info: ConnectError"):
        time_tokens(CONFIG.rollout.sglang, GEOMETRY, **options)


@pytest.mark.end_to_end
def test_doctor_measures_devices_and_a_running_server_for_a_plan(served, tmp_path):
    path, notes = tmp_path / "figures.yaml", []
    options = ("--shrink=16", "--seconds=0.05")
    figures = measure(CONFIG, path, devices=2, url=served[0].url, progress=notes.append, options=options)
    assert figures.node_bytes_per_second > 0 and figures.link_bytes_per_second is None
    assert list(figures.server.token_seconds) == [1, 32, 64] and figures.server.context_tokens < 128
    assert "timing tokens of 32 responses at once" in notes
    path.write_text(yaml.safe_dump(figures.model_dump()))
    assert read_figures(path, CONFIG, GEOMETRY) == figures
    with pytest.raises(ValueError, match=r"(?s)ended with status .*--shrink: invalid int value: 'none'"):
        measure(CONFIG, path, devices=2, url=None, progress=notes.append, options=("--shrink=none",))


@pytest.mark.end_to_end
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_machine_without_the_experiments_gpus_is_refused(tmp_path):
    config = validated(composed(["experiment=arithmetic", "resources.device=h100_80gb", "model.dtype=bfloat16"]))
    with pytest.raises(ValueError, match="torch sees 0 GPUs on this machine"):
        measure(config, tmp_path / "f.yaml", devices=1, url=None, progress=lambda note: None)
