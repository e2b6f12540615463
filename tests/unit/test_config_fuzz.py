"""Any value of any key: a configuration that passes every check and survives its file, or one message about it.

`OREAL_FUZZ=5000 pytest -m slow tests/unit/test_config_fuzz.py` draws more. The reduced tests are seeded.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from rich.console import Console

from oreal_megatron.cli.planning import planned_config
from oreal_megatron.compose import composed, resolved, validated
from oreal_megatron.config import ConfigError, TrainConfig, check_layout, check_resume, parse_config
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.preflight import check_startable
from tests.tiny import command_line

SITE = ["cluster.models=/site", "cluster.data=/site", "cluster.runs=/site/runs"]
EXPERIMENTS = (
    ["experiment=arithmetic"],
    ["experiment=own_model", "model.path=/m", "data.train=/t", "+evaluation.benchmarks.math500=/e"],
    ["experiment=oreal_32b_disaggregated", *SITE],
    ["experiment=oreal_7b", "fp8=blockwise", "verifier=rules_and_judge", "objective=grpo", *SITE],
)
MANY = int(os.environ.get("OREAL_FUZZ", "2000"))
SHARED = settings(database=None, suppress_health_check=list(HealthCheck))


def reduced(count: int) -> settings:
    return settings(SHARED, max_examples=count, derandomize=True)


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 1e-320, 1e308, -0.0]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "???", "null", "1", "a/b", "../x", "~", "{question}", "a\nb", "a\0b", "\ud800", "é漢🙂", "x" * 5000]
    ),
    st.sampled_from(
        ["'", '"', "\\", "a=b", "a,b", "[", "{", "$", "${", "${run.dir}", "${nothing}", "<|x|>", "%s", "{}"]
    ),
    st.text(max_size=20),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every key below the root, of sections as well as of their values and the elements of lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [place for key, item in items for place in places(item, (*path, key))]
    return [path, *inner] if path else inner


PLAIN: list[dict[str, Any]] = []
PLACES: list[tuple[int, tuple]] = []


def load() -> None:
    if not PLAIN:
        PLAIN.extend(resolved(composed(overrides)) for overrides in EXPERIMENTS)
        PLACES.extend((index, place) for index, raw in enumerate(PLAIN) for place in places(raw))


@st.composite
def changed(draw) -> tuple[dict[str, Any], list[tuple]]:
    """A composed configuration with one to three keys of other values, and these keys."""
    load()
    index, first = draw(st.sampled_from(PLACES))
    own = [place for other, place in PLACES if other == index]
    chosen = [first, *draw(st.lists(st.sampled_from(own), max_size=2))]
    raw = copy.deepcopy(PLAIN[index])
    for place in chosen:
        holder: Any = raw
        try:
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = draw(VALUES)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change removed the place
    return raw, chosen


def check(raw: dict[str, Any], chosen: list[tuple]) -> None:
    try:
        config = parse_config(raw)
        survives(config)
    except ConfigError as error:
        names(error, chosen)


def survives(config: TrainConfig) -> None:
    """Checks what happens to a valid configuration before anything is built."""
    saved = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    check_resume(saved, config, "config.yaml")
    if config.model.geometry is not None:
        check_layout(config.model.geometry, config.parallel, config.rollout.sglang)
    with contextlib.suppress(ConfigError):  # the paths do not exist
        check_startable(config, 1)


def names(error: ConfigError, chosen: list[tuple]) -> None:
    """Checks that the message has a line for each violation, and names a key that was changed or its section."""
    lines = str(error).split("\n")
    assert lines[0].startswith(f"{len(error.violations)} problem") and len(lines) == 1 + len(error.violations)
    assert all(violation.remedy.endswith(".") for violation in error.violations), str(error)
    message = str(error)
    assert any(str(place[0]) in message for place in chosen), (chosen, message)


GROUPS = ("model", "data", "prompt", "objective", "rollout", "verifier", "sft", "evaluation", "fp8", "cluster")
KEY_TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["objektive", "run", "run.nam", "run.seed.x", "hydra.job", "a.b.c"])
)


@st.composite
def overrides(draw) -> list[str]:
    """Overrides of the command line: any key, any text, quoted or not."""
    load()
    found = []
    for _ in range(draw(st.integers(1, 2))):
        _, place = draw(st.sampled_from(PLACES))
        key = draw(st.one_of(st.just(".".join(map(str, place))), st.sampled_from(GROUPS), KEY_TEXTS))
        value = draw(
            st.one_of(
                TEXTS,
                SCALARS.map(str),
                st.sampled_from(
                    [
                        "9" * 5000,
                        "1e999",
                        "[1,",
                        "{a:1}",
                        "[1,2]",
                        "glob(r*)",
                        "choice(oreal,grpo)",
                        "range(1,3)",
                        "interval(0,1)",
                    ]
                ),
            )
        )
        quoted = draw(
            st.sampled_from(["{}={}", "{}={}", '{}="{}"', "{}='{}'", "+{}={}", "++{}={}", "~{}", "{}", "{}=[{}]"])
        )
        found.append(quoted.format(key, value))
    return [*found, *draw(st.sampled_from([[], ["run.dry_run=true"], ["experiment=oreal_7b", "run.dry_run=true"]]))]


def check_overrides(overrides: list[str]) -> None:
    try:
        raw = composed(overrides)
        survives(validated(shrunk(raw) if is_dry_run(raw) else raw))
        planned_config(overrides, Console(file=io.StringIO()), config_dir=None)
    except ConfigError as error:
        assert len(str(error).split("\n")) == 1 + len(error.violations) and "Traceback" not in str(error), str(error)


@reduced(600)
@given(changed())
def test_any_value_is_a_configuration_or_a_message(case):
    check(*case)


@pytest.mark.slow
@settings(SHARED, max_examples=MANY)
@given(changed())
def test_many_values_are_a_configuration_or_a_message(case):
    check(*case)


@reduced(150)
@given(overrides())
def test_any_override_is_a_configuration_or_a_message(overrides):
    check_overrides(overrides)


@pytest.mark.slow
@settings(SHARED, max_examples=MANY // 2)
@given(overrides())
def test_many_overrides_are_a_configuration_or_a_message(overrides):
    check_overrides(overrides)


def ends_without_a_traceback(overrides: list[str], *, runs: bool) -> None:
    """oreal-train with these overrides prints a configuration, or ends with one message."""
    # A text with a zero byte is no argument of a process.
    assume(not any("\0" in override or override.startswith("-") for override in overrides))
    flags = [] if runs else ["--cfg", "job"]
    outcome = command_line(*flags, *overrides)
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert outcome.returncode == 0 or outcome.stderr.startswith("error: "), outcome.stderr


@st.composite
def refused_overrides(draw) -> list[str]:
    """Overrides that compose, to a configuration that is refused."""
    load()
    found = draw(overrides())
    try:
        raw = composed(found)
    except ConfigError:
        reject()
    with contextlib.suppress(ConfigError):
        validated(shrunk(raw) if is_dry_run(raw) else raw)
        reject()
    return found


@pytest.mark.end_to_end
@reduced(6)
@given(overrides())
def test_command_prints_a_configuration_or_a_message(overrides):
    ends_without_a_traceback(overrides, runs=False)


@pytest.mark.slow
@pytest.mark.end_to_end
@settings(SHARED, max_examples=40)
@given(refused_overrides())
def test_command_refuses_before_it_builds(overrides):
    ends_without_a_traceback(overrides, runs=True)
