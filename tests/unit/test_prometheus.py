"""The endpoint for Prometheus: a real tracker, asked over HTTP; the dashboard has only metrics that are documented."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from oreal_megatron.config import ConfigError, parse_config
from oreal_megatron.metrics import Tracker
from oreal_megatron.prometheus import metric_name
from oreal_megatron.types import EvaluationReport, StepReport

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "examples" / "monitoring"
QUIET = ("tracking.console=quiet", "tracking.wandb=disabled", "tracking.tensorboard=false")


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture
def config(composed, port):
    return parse_config(composed(*QUIET, f"tracking.prometheus_port={port}"))


@pytest.fixture
def tracker(config, tmp_path):
    made = Tracker(config, tmp_path / "my run", is_main=True)
    (tmp_path / "my run").mkdir()
    made.start(0, is_evaluated=False)
    yield made
    made.close()


def served(port):
    """Values by name, and by name and benchmark for those of an evaluation; every one has the run's label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert {family.type for family in families} == {"gauge"}
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"my run"}
    labels = [sample.labels.get("benchmark") for sample in samples]
    values = {
        (sample.name, benchmark) if benchmark else sample.name: sample.value
        for sample, benchmark in zip(samples, labels, strict=True)
    }
    assert len(values) == len(samples)
    return values


def test_metrics_have_names_values_and_times(tracker, port):
    before = time.time()
    assert before - 60 < served(port).pop("oreal_start_timestamp_seconds") <= before
    assert len(served(port)) == 1
    metrics = {
        "rollout/response_tokens": 12.5,
        "data/drawn_pass_rate_0.2_to_0.4": 0.25,
        "loss/kl": math.nan,
        "policy/grad_norm": math.inf,
    }
    tracker.step(StepReport(step=7, metrics=metrics, seconds={"total": 2.0}, peak_gib={"policy": 3.0}))
    values = served(port)
    assert before <= values.pop("oreal_last_step_timestamp_seconds") <= time.time()
    assert math.isnan(values.pop("oreal_loss_kl"))
    del values["oreal_start_timestamp_seconds"]
    assert values == {
        "oreal_rollout_response_tokens": 12.5,
        "oreal_data_drawn_pass_rate_0_2_to_0_4": 0.25,
        "oreal_policy_grad_norm": math.inf,
        "oreal_seconds_total": 2.0,
        "oreal_peak_gib_policy": 3.0,
        "oreal_step": 7.0,
    }


def test_evaluation_stays_over_steps_and_a_step_replaces_the_one_before(tracker, port):
    tracker.step(StepReport(step=0, metrics={"loss/policy": 1.0}, seconds={"total": 1.0}))
    values = {"heldout/greedy_pass@1": 0.5, "aime/greedy_pass@1": 0.25, "aime/step": 9.0}
    tracker.evaluation(EvaluationReport(step=1, metrics=values, seconds=1.0))
    tracker.step(StepReport(step=1, skipped="no group", seconds={"total": 1.0}))
    found = served(port)
    assert "oreal_loss_policy" not in found and found["oreal_step"] == 1.0
    evaluated = {key: value for key, value in found.items() if "oreal_evaluation" in str(key)}
    assert evaluated == {
        "oreal_evaluation_step": 1.0,
        ("oreal_evaluation_greedy_pass_1", "heldout"): 0.5,
        ("oreal_evaluation_greedy_pass_1", "aime"): 0.25,
        ("oreal_evaluation_step", "aime"): 9.0,
    }


def test_port_in_use_is_refused_when_the_tracker_opens(config, port, tmp_path):
    with socket.create_server(("", port)):
        with pytest.raises(ConfigError, match=rf"tracking.prometheus_port = {port}: .*in use.* free port") as refused:
            Tracker(config, tmp_path, is_main=True)
        assert refused.value.host == socket.gethostname()
        Tracker(config, tmp_path, is_main=False).close()  # only the main rank serves


def test_port_is_free_and_no_thread_is_left_after_the_run(config, port, tmp_path):
    threads = set(threading.enumerate())
    tracker = Tracker(config, tmp_path, is_main=True)
    opened = set(threading.enumerate()) - threads
    assert opened and all(thread.daemon for thread in opened)
    tracker.close()
    assert not any(thread.is_alive() for thread in opened)
    Tracker(config, tmp_path, is_main=True).close()


def test_port_is_free_after_wandb_has_refused(composed, port, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(composed(*QUIET, "tracking.wandb=online", f"tracking.prometheus_port={port}"))
    with pytest.raises(ConfigError, match=r"tracking\.wandb"):
        Tracker(config, tmp_path, is_main=True)
    socket.create_server(("", port)).close()


def documented():
    """Names in Prometheus of the metrics that docs/metrics.md lists."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert "## Seconds and memory" in page and "## Evaluations" in page
    names = set(re.findall(r"`(oreal_[a-z_]+)`", page))
    for section in page.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        kinds = {"Seconds and memory": ("seconds/", "peak_gib/"), "Evaluations": ("evaluation/",)}.get(title, ("",))
        for row in (line for line in text.splitlines() if line.startswith("| `")):
            for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
                names |= {metric_name(kind + name) for kind in kinds}
                if "in evaluations:" in row:
                    names.add(metric_name(f"evaluation/{name.partition('/')[2]}"))
    return names | {metric_name(name) for name in re.findall(r"`(policy/older_[a-z_0-9]+)`", page)}


def test_dashboard_asks_for_metrics_that_are_documented():
    dashboard = json.loads((MONITORING / "grafana_dashboard.json").read_text())
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 39
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["title"] and panel["gridPos"]["w"] + panel["gridPos"]["x"] <= 24
        assert panel["targets"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"\boreal_[a-zA-Z0-9_]+", expression)}
    assert len(asked) > 20 and asked - documented() == set()
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    alerted = {name for rule in rules for name in re.findall(r"\boreal_[a-z_0-9]+", rule["expr"])}
    assert alerted and alerted - documented() == set()


def test_scrape_configuration_names_the_alerts_beside_it():
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert [job["job_name"] for job in scraped["scrape_configs"]] == ["oreal", "sglang"]
    assert all((MONITORING / name).is_file() for name in scraped["rule_files"])
