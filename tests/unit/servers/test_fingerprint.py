"""A server is the policy's, or refused with what differs: also a server in FP8 that was started for other blocks."""

from __future__ import annotations

import json

import pytest

from oreal_megatron.conversion.huggingface import geometry_of, served_config
from oreal_megatron.servers.client import ServerDescription
from oreal_megatron.servers.fingerprint import check_server, fingerprint
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
