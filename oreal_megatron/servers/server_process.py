"""An SGLang server as a process of ours: its command, its environment, its start and its end."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import oreal_megatron
from oreal_megatron.config import SGLangConfig

_SHIMS = Path(__file__).parent / "cpu_shims"
# SGLang refuses prompts that come within 6 tokens of the context's end.
_CONTEXT_MARGIN = 8
_LOG_LINES = 25
# Below those that Linux gives to connections and to whoever asks for any port: a server that is restarted finds its own
# port free.
_FREE_PORTS = range(20_000, 32_768)
# What torchrun tells its processes of their job; a server's ranks, a job of their own, would wait for a store that they
# believe torchrun to hold.
_OF_TORCHRUN = {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"} | {
    f"{of}{name}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")
}
_GRACE_SECONDS = 5.0


NO_WEIGHTS = "none"
"""What a server calls its weights until a publication has reached it."""
OFFLOADED = "asleep"
"""What it calls them once it has given its memory back, until it is woken with others."""


def start_directory(servers: Path) -> Path:
    """What servers start from, a config.json alone; servers: the `servers` directory of the run."""
    return servers / "model"


def offloaded_mark(model: Path) -> Path:
    """A file that is there while servers on the trainer's devices must not be started. model: `start_directory`."""
    return model.parent / "resting"


class ServerStartError(RuntimeError):
    """A server cannot be started, or ended while it started; the message has the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Starts servers of one kind, with random weights."""

    config: SGLangConfig
    model: Path
    """Directory with the config.json."""
    weight_loader: str
    """Name of the function that takes orders of publications."""
    dtype: str
    max_sequence_length: int
    logs: Path
    first_device: int = 0
    """Of the machine: those before are the trainer's."""

    def start(self, index: int, port: int, *, place: int | None = None) -> ServerProcess:
        """index: names the log. place: which of the servers of its machine it is; None: index.

        Raises:
            ServerStartError: SGLang is not installed.
        """
        place = index if place is None else place
        command = _command(self, port, device=self.first_device + place * self.config.tensor)
        return ServerProcess(command, launch_environment(self.config), self.logs / f"server_{index}.log")


@dataclass
class Restarts:
    """How often in a row one server was started anew, of as often as it may be."""

    most: int
    in_a_row: int = 0

    def another(self) -> bool:
        """Counts one more; false where that is one too many."""
        self.in_a_row += 1
        return self.in_a_row <= self.most

    def reset(self) -> None:
        """It has proved itself."""
        self.in_a_row = 0


def _command(launcher: Launcher, port: int, *, device: int) -> list[str]:
    """The command line of one server. device: its first one, of a GPU server."""
    config = launcher.config
    options: dict[str, str | int | float | bool] = {
        "model-path": str(launcher.model.absolute()),
        "load-format": "dummy",
        "custom-weight-loader": launcher.weight_loader,
        "weight-version": NO_WEIGHTS,
        "host": config.host,
        "port": port,
        "device": config.device,
        "tp": config.tensor,
        "mem-fraction-static": config.memory_share,
        "dtype": launcher.dtype,
        "context-length": launcher.max_sequence_length + _CONTEXT_MARGIN,
        "max-running-requests": config.max_concurrency,
        "skip-tokenizer-init": True,
        "skip-server-warmup": True,
        "log-level": "warning",
    }
    if config.device == "cuda":
        # Where nothing saves memory (on CPU, too) SGLang takes orders to release it, and releases none.
        options |= {"base-gpu-id": device, "enable-memory-saver": config.shares_devices}
    if config.device == "cpu":
        options |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "sleep-on-idle": True,
        }
    options |= {name.replace("_", "-"): value for name, value in config.arguments.items()}
    command = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in options.items():
        if value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def launch_environment(config: SGLangConfig) -> dict[str, str]:
    """The environment of one server.

    Raises:
        ServerStartError: SGLang is not installed.
    """
    own = Path(sys.prefix) / "sglang"  # where `make sglang-deps` puts it
    ours = str(Path(oreal_megatron.__file__).parents[1])  # its workers import the weight loader
    inherited = [ours, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    # The margin may go beyond what config.json says of the model; no token is ever there.
    environment |= {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if config.device == "cuda":
        if importlib.util.find_spec("sglang") is None:
            raise ServerStartError("rollout.backend=sglang: SGLang is not installed; pip install '.[sglang]'")
        return environment | {"PYTHONPATH": os.pathsep.join(inherited)}
    if not (own / "sglang").is_dir():
        raise ServerStartError(f"rollout.backend=sglang: SGLang is not in {own}; `make sglang-deps` puts it there")
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(_SHIMS), str(own), *inherited]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.tensor > 1:  # one core a rank
        cores = sorted(os.sched_getaffinity(0))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(config.tensor)
        )
    return environment


def choose_port(config: SGLangConfig, index: int) -> int:
    """The port of launched server `index`.

    Raises:
        ServerStartError: the configured one is taken, or none is free.
    """
    if config.port is not None:
        ports = [config.port + index]
    else:
        free = _FREE_PORTS[index :: config.num_servers]
        ports = random.SystemRandom().sample(free, k=min(len(free), 100))
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
                return port
            except OSError as error:
                taken = error
    raise ServerStartError(
        f"rollout.sglang.port = {config.port}: server {index} cannot listen at {config.host}:{ports[-1]} "
        f"({taken.strerror}); name other ports, or null for free ones"
    ) from taken


class ServerProcess:
    """A running server and everything it has started: one session, which ends with us, however we end."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path):
        """Starts it. Call from a thread that lives as long as the server may: it ends with that thread."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with open(log, "ab") as stream:
            stream.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            stream.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "oreal_megatron.servers.die_with_parent", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the server, and of its process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(f"    {line[:300]}" for line in lines)

    def stop(self) -> None:
        """Ends the server and what it has started; returns when they are gone."""
        for name, seconds in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(self.pid, name)
            except ProcessLookupError:
                break
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
