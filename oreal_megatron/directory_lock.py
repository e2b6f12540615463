"""Lock of a run's directory: one live run at a time, on this machine and on others that share the file system.

The lock is a POSIX record lock on the file `lock`. It belongs to the process, not to the open file: forked processes,
such as the writer of a checkpoint, do not keep it, and the kernel releases it however the process ends. A network file
system releases the locks of a lost machine once their lease ends (NFS 4: 90 s). The process that holds the lock must
not open the file a second time: closing any descriptor of it releases the lock.

The file names its owner, for messages, and for file systems whose locks do not reach other machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from oreal_megatron.files import naming

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
_LEASE_SECONDS = 120.0
"""Time after which a network file system has released the locks of a lost machine."""
_CACHE_SECONDS = 35.0
"""Time after which a client of a network file system has read a directory again (NFS: acdirmin is 30 s)."""
_POLL_SECONDS = 1.0
_MAX_BYTES = 4096
# Mount options of NFS and Lustre, with which a lock holds on one machine only.
_LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=posix", "localflock"}


@contextlib.contextmanager
def locked(directory: Path, *, max_wait_seconds: float = _LEASE_SECONDS) -> Iterator[str]:
    """Holds the lock of a run's directory until the block is left; yields the text of the lock file.

    The lock of a process that has ended is taken without a question. A process on another machine may be lost with its
    machine: its lock is waited for as long as a file system needs to notice that, at most `max_wait_seconds`.

    Raises:
        OSError: another run holds the lock, or may hold it; the message names its process and the remedy. Or the
            directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(
            f"run.dir = {str(directory)!r}: The run cannot write there ({error}). Name another directory."
        ) from error
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        _acquire(file, directory, min(_LEASE_SECONDS, max_wait_seconds))
        with naming(directory / LOCK_FILE):
            text = json.dumps(_this_process())
            _write(file, text)
        try:
            yield text
        finally:
            _write(file, "")


def check_shared(directory: Path, text: str, *, rank: int, max_wait_seconds: float = _CACHE_SECONDS) -> None:
    """Waits until this process reads the lock file as another process, which holds the lock, has written it.

    text: what `locked` yielded there. rank: of this process, for the message. A network file system may show an older
    state for as long as clients keep attributes of files, at most `max_wait_seconds`.

    Raises:
        OSError: this process has another directory under that path.
    """
    deadline = time.monotonic() + min(max_wait_seconds, _CACHE_SECONDS)
    while _text(directory) != text:
        if time.monotonic() > deadline:
            raise OSError(
                f"run.dir = {str(directory)!r}: rank {rank} on {socket.gethostname()} does not see the files that rank "
                f"0 on {json.loads(text)['host']} writes to {directory.absolute()}. Name a directory on storage that "
                "all hosts of the run share."
            )
        time.sleep(_POLL_SECONDS)


def _text(directory: Path) -> str | None:
    """Returns the text of a directory's lock file; None if there is no such file."""
    try:
        return (directory / LOCK_FILE).read_text(errors="replace")
    except OSError:
        return None


def _acquire(file: IO[bytes], directory: Path, max_wait_seconds: float) -> None:
    deadline = time.monotonic() + max_wait_seconds
    is_announced = False
    while (outcome := _try_lock(file)) == "held":
        owner = _owner(file)  # None between the lock and the first write
        if (owner is not None and owner["boot"] == _boot()) or time.monotonic() > deadline:
            raise OSError(_refusal(directory, owner))
        if owner is not None and not is_announced:
            limit = f"up to {max_wait_seconds:.0f} s, in case that machine is lost"
            logger.warning("%s is locked by %s; waiting %s", directory, _described(owner), limit)
            is_announced = True
        time.sleep(_POLL_SECONDS)
    is_local = outcome == "unsupported" or _LOCAL_LOCKS & _mount_options(directory)
    if is_local and (owner := _owner(file)) is not None and _may_live(owner):
        raise OSError(_refusal(directory, owner))


def _try_lock(file: IO[bytes]) -> Literal["acquired", "held", "unsupported"]:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return "held"
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return "unsupported"
        raise
    return "acquired"


def _may_live(owner: Mapping[str, Any]) -> bool:
    """Returns whether the process that a lock file names may be alive, where locks do not reach other machines."""
    now = _this_process()
    if owner["boot"] == now["boot"]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(owner["pid"]).create_time() == owner["created"]
        return False
    # A machine that was started again, and a job that SLURM started again: their earlier processes have ended.
    is_earlier_start = owner["slurm_job"] == now["slurm_job"] and owner["slurm_restarts"] != now["slurm_restarts"]
    return owner["host"] != now["host"] and not (now["slurm_job"] is not None and is_earlier_start)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot(),
        "created": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _boot() -> str:
    """Returns the id of this start of this machine's kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _mount_options(directory: Path) -> set[str]:
    """Returns the mount options of the file system that holds a directory."""
    path = directory.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
    innermost = sorted(mounts, key=lambda mount: len(mount.mountpoint))[-1:]  # none in some containers
    return {option for mount in innermost for option in mount.opts.split(",")}


def _owner(file: IO[bytes]) -> dict[str, Any] | None:
    """Returns what the lock file says of its owner; None where it is empty, was cut, or is no such file."""
    try:
        owner = json.loads(os.pread(file.fileno(), _MAX_BYTES, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= _this_process().keys() else None


def _write(file: IO[bytes], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text.encode())
    os.fsync(file.fileno())


def _refusal(directory: Path, owner: Mapping[str, Any] | None) -> str:
    remedy = "Wait for its end, stop it, or name another run.dir."
    if owner is not None and owner["boot"] != _boot():
        remedy += f" If it has surely ended, remove {directory / LOCK_FILE}."
    return f"run.dir = {str(directory)!r}: Another run is live here: {_described(owner)}. {remedy}"


def _described(owner: Mapping[str, Any] | None) -> str:
    if owner is None:
        return "a process that does not name itself"
    job = f", SLURM job {owner['slurm_job']}" if owner["slurm_job"] else ""
    return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"
