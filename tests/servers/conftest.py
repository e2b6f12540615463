"""One SGLang server for all tests of this directory, with weights published by a Megatron policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_tiny
from tests.tiny_servers import Servers, has_sglang, open_servers


def require_sglang() -> None:
    if not has_sglang():
        pytest.skip("SGLang is not installed here: make sglang-deps")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With feed-forward layers that SGLang pads on CPU."""
    return save_tiny(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=False, ffn=80)


@pytest.fixture(scope="session")
def servers(single_process: Any, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A launched server at weight version 0."""
    require_sglang()
    opened = open_servers(single_process, tiny_qwen, tmp_path_factory.mktemp("servers"))
    try:
        opened.engine.publish(0)
        yield opened
    finally:
        opened.engine.close()
