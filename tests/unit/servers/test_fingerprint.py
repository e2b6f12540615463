"""A server is the policy's, or refused with what differs: also a server in FP8 that was started for other blocks."""

from __future__ import annotations

import contextlib
import json

import pytest

from oreal_megatron.conversion.huggingface import geometry_of, served_config
from oreal_megatron.servers.client import ServerClient, ServerDescription
from oreal_megatron.servers.fingerprint import check_options, check_server, fingerprint
from tests.fake_sglang import LOADER, fake_servers, sglang_config
from tests.tiny_models import save_tiny

URL = "http://127.0.0.1:30000"


@pytest.fixture
def described(tmp_path):
    """Returns a function that makes a description and the expected fingerprint. changed: served config.json."""
    source = save_tiny(tmp_path / "source", "qwen3", tied=False)
    geometry = geometry_of(source)
    common = {"dtype": "bfloat16", "max_positions": 64, "stop_token_id": 7}

    def make(*, fp8, **changed):
        expected = served_config(str(source), geometry, fp8=fp8, **common)
        served = tmp_path / "served"
        served.mkdir(exist_ok=True)
        (served / "config.json").write_text(json.dumps({**expected, **changed}))
        server = ServerDescription(
            model_path=str(served),
            weight_label="none",
            dtype="bfloat16",
            version="0.5.23",
            device="cuda",
            tensor=1,
            weight_loaders=(),
            saves_memory=True,
            verification={},
        )
        return server, fingerprint(geometry, "bfloat16", expected)

    return make


@pytest.mark.parametrize("fp8", [False, True])
def test_a_server_that_started_from_the_runs_own_config_is_taken(described, fp8):
    check_server(URL, *described(fp8=fp8))


@pytest.mark.parametrize(
    ("fp8", "changed", "differing"),
    [
        (True, {"quantization_config": None}, r"quantization_config None instead of \{.*\[128, 128\]"),
        (
            True,
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
            r"quantization_config \{'quant_method': 'fp8', 'activation_scheme': 'dynamic'\} instead of",
        ),
        (
            True,
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "activation_scheme": "dynamic",
                    "weight_block_size": [64, 64],
                }
            },
            r"\[64, 64\].* instead of .*\[128, 128\]",
        ),
        (False, {"quantization_config": {"quant_method": "fp8"}}, "instead of None"),
        (False, {"intermediate_size": 64}, "ffn_hidden_size 64 instead of 96"),
    ],
)
def test_another_is_refused_with_what_differs(described, fp8, changed, differing):
    server, expected = described(fp8=fp8, **changed)
    with pytest.raises(ValueError, match=f"{URL} serves another model: .* has fingerprint .*{differing}"):
        check_server(URL, server, expected)


@pytest.fixture
def fakes(tmp_path):
    with fake_servers(tmp_path) as opened:
        yield opened


REJECTING = {"speculative-algorithm": "NEXTN", "speculative_use_rejection_sampling": True}


@pytest.mark.parametrize(
    ("info", "arguments", "differing"),
    [
        ({}, {}, None),
        ({"speculative_algorithm": "EAGLE", "speculative_use_rejection_sampling": True}, REJECTING, None),
        ({"speculative_algorithm": "EAGLE3"}, {}, "speculative-algorithm EAGLE3, .*speculative-algorithm is None"),
        ({}, REJECTING, "speculative-algorithm None, .*speculative-algorithm is NEXTN"),
        ({"speculative_algorithm": "EAGLE"}, REJECTING, "speculative-use-rejection-sampling False, .* is True"),
        ({"speculative_accept_threshold_acc": 0.5}, {}, "speculative-accept-threshold-acc 0.5, .* is 1.0"),
    ],
)
def test_attached_server_verifies_drafts_as_the_run_says(fakes, info, arguments, differing):
    fake = fakes.server(info=info)
    config = sglang_config(urls=(fake.url,), arguments=arguments)

    async def described() -> ServerDescription:
        client = ServerClient(fake.url, max_concurrency=1, control_seconds=1.0, health_seconds=60.0)
        found = await client.describe()
        await client.close()
        return found

    found = fakes.run(described())
    refused = pytest.raises(ValueError, match=f"{fake.url} was started with {differing}; start")
    with contextlib.nullcontext() if differing is None else refused:
        check_options(fake.url, found, config, LOADER, "run")
