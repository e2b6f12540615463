"""Ends of commands: status and message of every kind of error, and the traceback on request, for every command."""

from __future__ import annotations

import sys

import pytest

from oreal_megatron import __version__
from oreal_megatron.cli import convert, doctor, eval, plan, report, serve, submit, train, verify
from oreal_megatron.cli.errors import run_command
from oreal_megatron.config import ConfigError, Violation
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.stopping import LostPeer, Stopped

WRONG = "objektive=grpo"
COMMANDS = {
    "train": (train, [WRONG]),
    "eval": (eval, ["no-such-model", "--benchmark", "math500=math500.jsonl"]),
    "report": (report, ["no-such-run"]),
    "plan": (plan, [WRONG]),
    "submit": (submit, [WRONG]),
    "doctor": (doctor, [WRONG]),
    "serve": (serve, ["--announce", "urls", WRONG]),
    "convert": (convert, ["compare", "no-such-model"]),
    "verify": (verify, ["no-such-file.jsonl", "--output", "out.jsonl"]),
}


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    for name in ("RANK", "OREAL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restored at the end, since oreal-train sets it


def end_of(error: BaseException | None, *, continues: bool = False) -> int | str | None:
    def command() -> int:
        if error is not None:
            raise error
        return 3

    with pytest.raises(SystemExit) as ended:
        run_command(command, continues=continues)
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError([Violation("run.seed", -1, "Set it.")]), 1, "run.seed = -1: Set it."),
        (ValueError("no such layout"), 1, "error: no such layout"),
        (ZeroDivisionError("no tokens"), 1, "error: no tokens"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'"),
        (Stopped("checkpoint step_000002 is saved"), 75, "checkpoint step_000002 is saved"),
        (
            NoServerError.of({"http://a": "died"}, 1),
            1,
            "cannot be used:\n  http://a: died",
        ),
        (LostPeer("rank 1 failed"), 1, "rank 1 failed"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_error_ends_with_status_and_message(capsys, monkeypatch, error, status, message):
    assert end_of(error) == status
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    monkeypatch.setenv("OREAL_TRACEBACK", "1")
    assert end_of(error) == status
    err = capsys.readouterr().err
    assert message in err and ("Traceback" in err) == (status != 75)  # a stop is no error


def test_status_of_the_command_is_kept():
    assert end_of(None) == 3


def test_interrupt_says_where_the_same_command_continues(capsys):
    assert end_of(KeyboardInterrupt(), continues=True) == 130
    assert "same command continues" in capsys.readouterr().err


def test_unexpected_error_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(lambda: {}["x"])


def test_configuration_error_is_printed_by_one_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert end_of(ConfigError([Violation("run.seed", -1, "Set it.")])) == 1
    assert capsys.readouterr().err == ""


def run(name: str, arguments: list[str], monkeypatch) -> int | str | None:
    module, _ = COMMANDS[name]
    monkeypatch.setattr(sys, "argv", [f"oreal-{name}", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_command_shows_its_traceback_on_request(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    arguments = COMMANDS[name][1]
    assert run(name, arguments, monkeypatch) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and ("objektive" in err or "no-such" in err)
    monkeypatch.setenv("OREAL_TRACEBACK", "1")
    assert run(name, arguments, monkeypatch) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and ("objektive" in err or "no-such" in err)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_command_has_help_with_an_example_and_a_version(capsys, monkeypatch, name):
    assert run(name, ["--help"], monkeypatch) == 0
    assert "example:" in capsys.readouterr().out
    assert run(name, ["--version"], monkeypatch) == 0
    assert __version__ in capsys.readouterr().out
