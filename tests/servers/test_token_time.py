"""The time of a token on a real SGLang server, launched for it."""

from __future__ import annotations

import pytest

from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.rollout.token_time import time_tokens
from tests.servers.conftest import require_sglang
from tests.tiny_servers import MAX_SEQUENCE_LENGTH, servers_config

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]


def test_launched_server_is_timed(tiny_qwen, tmp_path):
    require_sglang()
    notes = []
    context_tokens, seconds = time_tokens(
        servers_config(max_concurrency=4),
        geometry_of(tiny_qwen),
        dtype="float32",
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        model_path=str(tiny_qwen),
        url=None,
        directory=tmp_path,
        progress=notes.append,
    )
    assert list(seconds) == [1, 4] and min(seconds.values()) > 0 and context_tokens < MAX_SEQUENCE_LENGTH
    assert notes[1:] == ["timing tokens of 1 responses at once", "timing tokens of 4 responses at once"]
    assert (tmp_path / "servers" / "server_0.log").is_file()
