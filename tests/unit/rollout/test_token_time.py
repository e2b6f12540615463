"""Timing a token: where the launched server is. tests/servers/test_token_time.py has a real one."""

from __future__ import annotations

import pytest

from oreal_megatron.config import GeometryConfig
from oreal_megatron.rollout import token_time
from tests.tiny_servers import MAX_SEQUENCE_LENGTH, servers_config

GEOMETRY = GeometryConfig(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, vocab_size=32
)


def test_launched_server_at_an_ipv6_address_has_a_url(monkeypatch, tmp_path):
    def launched(index, url, settings):
        raise RuntimeError(url)

    monkeypatch.setattr(token_time, "LaunchedServer", launched)
    with pytest.raises(RuntimeError, match=r"^http://\[::1\]:\d+$"):
        token_time.time_tokens(
            servers_config(host="::1"),
            GEOMETRY,
            dtype="float32",
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            model_path=None,
            url=None,
            directory=tmp_path,
            progress=print,
        )
