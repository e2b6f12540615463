from __future__ import annotations

from collections.abc import Iterator

import pytest

from oreal_megatron.verifier import StagedVerifier, VerifierConfig, build_verifier


@pytest.fixture(scope="package")
def verifier() -> Iterator[StagedVerifier]:
    """Rules only, one worker process, shared by the tests that leave it as it is.

    Its limit is wide: on a machine full of other work a comparison that takes half a second may wait for two.
    """
    with build_verifier(VerifierConfig(num_workers=1, timeout_seconds=15.0)) as shared:
        yield shared
