"""One live run a directory: who is refused, whose lock is taken, and what each error names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron import directory_lock
from oreal_megatron.directory_lock import LOCK_FILE, locked

HOLDER = """
import os, sys, time
from pathlib import Path
from oreal_megatron import directory_lock
directory, boot = Path(sys.argv[1]), sys.argv[2]
if boot:
    directory_lock._boot = lambda: boot
    directory_lock.socket.gethostname = lambda: "far-away"
with directory_lock.locked(directory):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(600)
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the lock of tmp_path; `boot`: as a process on another machine would."""
    holders = []

    def start(boot: str = "", *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), boot, *more]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        holders.append(holder)
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        return holder

    yield start
    for holder in holders:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_live_run_is_named_and_keeps_its_lock(hold, tmp_path):
    holder = hold()
    for _ in range(2):
        with (
            pytest.raises(OSError, match=f"process {holder.pid} on {socket.gethostname()}") as refused,
            locked(tmp_path),
        ):
            pass
        assert f"run.dir = '{tmp_path}'" in str(refused.value) and "remove" not in str(refused.value)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid


@pytest.mark.parametrize("more", [(), ("fork",)], ids=["alone", "with a child that lives on"])
def test_lock_of_a_killed_run_is_taken(hold, tmp_path, more):
    holder = hold("", *more)
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_run_on_another_machine_is_waited_for_then_refused(hold, tmp_path, monkeypatch):
    hold("another boot")
    waits = []
    monkeypatch.setattr(directory_lock, "_LEASE_SECONDS", 0.05)
    monkeypatch.setattr(directory_lock, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(directory_lock.logger, "warning", lambda text, *values: waits.append(text % values))
    with pytest.raises(OSError, match="on far-away") as refused, locked(tmp_path):
        pass
    assert f"remove {tmp_path / LOCK_FILE}" in str(refused.value)
    assert len(waits) == 1 and "waiting" in waits[0]


def test_lock_of_a_lost_machine_is_taken_once_the_file_system_releases_it(hold, tmp_path, monkeypatch):
    holder = hold("another boot")

    def lose(seconds: float) -> None:
        holder.kill()
        holder.wait()

    monkeypatch.setattr(directory_lock.time, "sleep", lose)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("left", "is_taken"),
    [
        ({}, False),
        ({"slurm_job": "7", "slurm_restarts": "0"}, True),  # SLURM started this job again
        ({"slurm_job": "7", "slurm_restarts": "1"}, False),  # another step of this start
        ({"slurm_job": "8"}, False),
        ({"host": socket.gethostname()}, True),  # this machine was started again
    ],
    ids=["another host", "earlier start", "same start", "another job", "earlier boot"],
)
@pytest.mark.parametrize("mount", ["nolock", "unsupported"])
def test_lock_that_no_other_machine_sees_is_taken_only_where_its_owner_surely_ended(
    tmp_path, monkeypatch, mount, left, is_taken
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if mount == "nolock":
        monkeypatch.setattr(directory_lock, "_mount_options", lambda directory: {"rw", "nolock"})
    else:
        monkeypatch.setattr(directory_lock, "_try_lock", lambda file: "unsupported")
    owner = {**directory_lock._this_process(), "host": "far-away", "boot": "b", "pid": 1, "slurm_job": None, **left}
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    if is_taken:
        with locked(tmp_path):
            pass
    else:
        with pytest.raises(OSError, match=f"remove {tmp_path / LOCK_FILE}"), locked(tmp_path):
            pass
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == owner


def test_file_system_without_locks_refuses_a_live_process_of_this_machine(hold, tmp_path, monkeypatch):
    holder = hold()
    monkeypatch.setattr(directory_lock, "_try_lock", lambda file: "unsupported")
    with pytest.raises(OSError, match=f"process {holder.pid} "), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


def test_directory_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(OSError, match=f"run.dir = '{directory}'"), locked(directory):
            pass


@pytest.mark.parametrize("left", [None, "", '{"host": "another run"}'])
def test_directory_of_another_machine_is_refused_and_waited_for(hold, tmp_path, monkeypatch, left):
    """The second directory stands for the same path on a machine that does not share it."""
    hold()
    text = (tmp_path / LOCK_FILE).read_text()
    directory_lock.check_shared(tmp_path, text, rank=3)
    other = tmp_path / "other"
    other.mkdir()
    if left is not None:
        (other / LOCK_FILE).write_text(left)
    with pytest.raises(OSError, match=rf"run\.dir = '{other}': rank 3 on .* does not see the files that rank 0 on"):
        directory_lock.check_shared(other, text, rank=3, max_wait_seconds=0)
    monkeypatch.setattr(directory_lock.time, "sleep", lambda seconds: (other / LOCK_FILE).write_text(text))
    directory_lock.check_shared(other, text, rank=3)


def test_mount_options_are_of_the_file_system_that_holds_the_directory(monkeypatch):
    from collections import namedtuple

    Mount = namedtuple("Mount", "mountpoint opts")
    mounts = [Mount("/", "rw"), Mount("/nfs", "rw,vers=3,nolock"), Mount("/nfs/runs", "rw,local_lock=none")]
    monkeypatch.setattr(directory_lock.psutil, "disk_partitions", lambda all: mounts)
    assert directory_lock._mount_options(Path("/nfs/a")) == {"rw", "vers=3", "nolock"}
    assert directory_lock._mount_options(Path("/nfs/runs/a")) == {"rw", "local_lock=none"}
