"""Servers in an environment of their own: the interpreter is checked, and gets its own packages, not the trainer's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import oreal_megatron
from oreal_megatron.cli import train
from oreal_megatron.config import SGLangConfig
from oreal_megatron.servers.server_process import (
    Launcher,
    ServerProcess,
    ServerStartError,
    choose_port,
    interpreter_problem,
    launch_environment,
    listening_address,
    server_url,
)
from tests.run_processes import wait_until
from tests.tiny_servers import servers_config


def interpreter(directory: Path, *, sglang: str | None) -> str:
    """Returns an interpreter that starts this Python with another directory of packages. sglang: its version there."""
    packages = directory / "packages"
    packages.mkdir(parents=True)
    if sglang is not None:
        (packages / f"sglang-{sglang}.dist-info").mkdir()
        (packages / f"sglang-{sglang}.dist-info" / "METADATA").write_text(f"Name: sglang\nVersion: {sglang}\n")
        (packages / "sglang").mkdir()
        launched = "import json, os, sys, oreal_megatron\n"
        launched += "print(json.dumps([sys.argv, oreal_megatron.__file__, os.environ['PYTHONPATH']]))\n"
        (packages / "sglang" / "launch_server.py").write_text(launched)
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{packages}" exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def config(**options) -> SGLangConfig:
    return servers_config(**options)


@pytest.mark.parametrize(
    ("sglang", "expected"), [("0.5.23", None), ("0.5.22", "it runs SGLang 0.5.22; 0.5.23 or newer is needed")]
)
def test_interpreter_has_a_new_enough_sglang(tmp_path, sglang, expected):
    assert interpreter_problem(interpreter(tmp_path, sglang=sglang)) == expected


def test_interpreter_without_sglang_or_no_interpreter_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "one" / "packages"))  # the trainer's packages do not count
    interpreter(tmp_path / "one", sglang="0.5.23")
    bare = interpreter(tmp_path / "two", sglang=None)
    assert "SGLang is not installed there" in str(interpreter_problem(bare))
    assert "it cannot be run" in str(interpreter_problem(str(tmp_path / "nothing")))
    launcher = Launcher(
        config=config(python=bare), model=tmp_path, weight_loader="fake.load", dtype="float32",
        max_sequence_length=64, logs=tmp_path,
    )  # fmt: skip
    with pytest.raises(ServerStartError, match=f"rollout.sglang.python = {bare}: SGLang is not installed there"):
        launcher.start(0, 20_000)


def test_server_runs_in_its_own_interpreter_with_this_package_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/for/the/trainer")
    monkeypatch.chdir(tmp_path)  # python -m looks there first
    python = interpreter(tmp_path, sglang="0.5.23")
    launcher = Launcher(
        config=config(python=python), model=tmp_path, weight_loader="fake.load", dtype="float32",
        max_sequence_length=64, logs=tmp_path / "logs",
    )  # fmt: skip
    process = launcher.start(0, 20_000)
    assert process._process.wait(60) == 0, process.log_tail()
    output = process.log.read_text()
    imports = tmp_path / "logs" / "imports"
    assert [path.name for path in imports.iterdir()] == ["oreal_megatron"]
    assert f'"{imports}/oreal_megatron/__init__.py"' in output and "launch_server.py" in output
    assert "/for/the/trainer" not in output and str(Path(sys.prefix) / "sglang") not in output
    assert (imports / "oreal_megatron").resolve() == Path(oreal_megatron.__file__).resolve().parent


def test_servers_and_trainer_agree_on_how_nccl_shares_memory(monkeypatch):
    python = "/environments/servers/bin/python"
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    found = launch_environment(config(python=python, device="cuda"))
    assert found["NCCL_CUMEM_ENABLE"] == "0"
    assert found["PATH"].split(os.pathsep)[0] == "/environments/servers/bin"
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    assert launch_environment(config(python=python, device="cuda"))["NCCL_CUMEM_ENABLE"] == "1"


def test_server_keeps_a_connection_for_as_long_as_a_request_may_be_held_up(monkeypatch):
    name = "SGLANG_TIMEOUT_KEEP_ALIVE"
    monkeypatch.delenv(name, raising=False)
    options = config(python=sys.executable, health_seconds=12.5)
    assert launch_environment(options)[name] == "13"
    monkeypatch.setenv(name, "7")
    assert launch_environment(options)[name] == "7"


def test_trainer_sets_it_before_torch_is_imported(monkeypatch):
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "")
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["oreal-train"])
    found = []
    monkeypatch.setattr(train, "_train", lambda: found.append(os.environ["NCCL_CUMEM_ENABLE"]))
    train._compose_and_train()
    assert found == ["0"]
    code = "import sys, oreal_megatron.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_schedulers_signal_to_all_processes_does_not_end_a_server(tmp_path):
    log = tmp_path / "log"
    server = ServerProcess(["bash", "-c", "echo serves; sleep 60"], os.environ, log)
    wait_until(lambda: "serves\n" in log.read_text().splitlines(keepends=True))
    os.killpg(server.pid, signal.SIGUSR1)
    server.stop()
    assert server.exit_code == -signal.SIGTERM


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_server_has_a_free_port_of_its_own_family_of_addresses(host):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        taken = probe.getsockname()[1]
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    with (
        socket.create_server((host, taken), family=family),
        pytest.raises(ServerStartError, match="cannot listen at"),
    ):
        choose_port(config(host=host, port=taken), 0)
    assert choose_port(config(host=host, port=taken), 0) == taken


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "[::1]", "no.such.name.invalid"])
def test_host_that_is_not_of_this_machine_is_named(host):
    with pytest.raises(ServerStartError, match=r"rollout\.sglang\.host = .*: this machine has no such address"):
        choose_port(config(host=host), 0)


def test_server_of_a_name_listens_at_every_address():
    """The name itself may be a loopback address on this machine, and no name at all."""
    assert [listening_address(host) for host in ("localhost", "no.such.name.invalid")] == ["0.0.0.0"] * 2
    assert [listening_address(host) for host in ("10.0.0.7", "fd00::7")] == ["10.0.0.7", "fd00::7"]
    assert [server_url(host, 80) for host in ("node7", "fd00::7")] == ["http://node7:80", "http://[fd00::7]:80"]
