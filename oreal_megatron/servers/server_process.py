"""An SGLang server as a child process: its command line, its environment, its start and its end."""

from __future__ import annotations

import errno
import functools
import importlib.util
import ipaddress
import math
import os
import random
import re
import shutil
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
from oreal_megatron.distributed.environment import NCCL_WITHOUT_CUMEM, NO_DEVICES

_SHIMS = Path(__file__).parent / "cpu_shims"
# SGLang refuses prompts that come within 6 tokens of the context's end.
_CONTEXT_MARGIN = 8
_CPU_SGLANG = Path(sys.prefix) / "sglang"  # filled by `make sglang-deps`
_LOG_LINES = 25
# Below Linux's ephemeral ports, so that a restarted server finds its port free.
_FREE_PORTS = range(20_000, 32_768)
# Variables that torchrun sets for its processes. A server's ranks are a job of their own; with these variables they
# would wait for torchrun's store.
_TORCHRUN_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"} | {
    f"{of}{name}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")
}
_GRACE_SECONDS = 5.0
# Share of the memory free at its start that a server may use whose tokens are limited: more than any plan gives it.
_WITH_TOKENS = 0.95
_PROBE_SECONDS = 120
_OLDEST_SGLANG = (0, 5, 23)
_PACKAGE = Path(oreal_megatron.__file__).parent


NO_WEIGHTS = "none"
"""Weight label of a server that has not been updated yet."""
OFFLOADED = "asleep"
"""Weight label of a server that has released its memory, until the next update."""


def start_directory(servers: Path) -> Path:
    """Returns the directory with the config.json that servers start from. servers: the run's `servers` directory."""
    return servers / "model"


def weight_label(version: int, run: str, start: str) -> str:
    """Returns the servers' label of a weight version. run: id of the run; start: id of this start of it."""
    return f"{version}-{run}-{start}"


def run_of_label(label: str) -> str | None:
    """Returns the id of the run whose weights a `weight_label` names; None for any other label."""
    match = re.fullmatch(r"\d+-([0-9a-z]+)-[0-9a-z]+", label)
    return match[1] if match else None


def offloaded_mark(model: Path) -> Path:
    """Returns the file that exists while servers on the trainer's devices must not start. model: `start_directory`."""
    return model.parent / "resting"


class ServerStartError(ValueError):
    """A server cannot be started, or ended while it started; the message has the last lines of its log."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Starts servers with random weights and the same options."""

    config: SGLangConfig
    model: Path
    """Directory with the config.json."""
    weight_loader: str
    """Name of the function that executes the commands of weight updates."""
    dtype: str
    max_sequence_length: int
    logs: Path
    kv_tokens: int | None = None
    """Tokens of the KV cache, for servers on the trainer's devices; None: what rollout.sglang.memory_share leaves."""
    first_device: int = 0
    """Index of the first device of the servers on the machine; devices below it are the trainer's."""

    def start(self, index: int, port: int, *, place: int | None = None) -> ServerProcess:
        """Starts a server. index: position in the run, for the log's name. place: position on its machine; None: index.

        Raises:
            ServerStartError: SGLang is not installed, or rollout.sglang.python does not run.
        """
        place = index if place is None else place
        command = _command(self, port, device=self.first_device + place * self.config.tensor)
        imports = _PACKAGE.parent
        if self.config.python is not None:
            if (problem := interpreter_problem(self.config.python)) is not None:
                raise ServerStartError(f"rollout.sglang.python = {self.config.python}: {problem}")
            # A directory with this package alone: beside an installed one are all packages of the trainer's.
            imports = self.logs / "imports"
            imports.mkdir(parents=True, exist_ok=True)
            link = imports / f"{_PACKAGE.name}.{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(_PACKAGE)
            link.replace(imports / _PACKAGE.name)  # an earlier start may have run from another checkout
        environment = launch_environment(self.config, imports=imports.absolute())
        return ServerProcess(command, environment, self.logs / f"server_{index}.log")


def _command(launcher: Launcher, port: int, *, device: int) -> list[str]:
    """Returns the command line of a server. device: its first GPU."""
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
        "mem-fraction-static": config.memory_share if launcher.kv_tokens is None else _WITH_TOKENS,
        "dtype": launcher.dtype,
        "context-length": launcher.max_sequence_length + _CONTEXT_MARGIN,
        "max-running-requests": config.max_concurrency,
        "skip-tokenizer-init": True,
        "skip-server-warmup": True,
        "log-level": "warning",
    }
    if config.device == "cuda":
        # Without the memory saver, and always on CPU, SGLang answers /release_memory_occupation and releases nothing.
        options |= {"base-gpu-id": device, "enable-memory-saver": config.shares_devices}
    if config.device == "cpu":
        options |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "sleep-on-idle": True,
        }
    if launcher.kv_tokens is not None:
        options["max-total-tokens"] = launcher.kv_tokens
    options |= config.options
    command = [config.python or sys.executable, "-m", "sglang.launch_server"]
    for name, value in options.items():
        if value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def check_version(where: str, version: str) -> None:
    """Raises ValueError if SGLang at `where` (a server's URL, an interpreter) is too old."""
    if tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()) < _OLDEST_SGLANG:
        raise ValueError(f"{where} runs SGLang {version}; {'.'.join(map(str, _OLDEST_SGLANG))} or newer is needed")


@functools.cache
def interpreter_problem(python: str) -> str | None:
    """Returns why a Python interpreter cannot run servers; None if its environment has an SGLang that is new enough."""
    code = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
    # The packages on PYTHONPATH are for the trainer's version of Python.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        found = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=_PROBE_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it cannot be run ({error}); name the Python of an environment with SGLang"
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"it ended with {found.returncode}"])[-1]
        return f"SGLang is not installed there ({reason}); install requirements/servers.lock there"
    try:
        check_version("it", found.stdout.strip())
    except ValueError as error:
        return str(error)
    return None


def installation_problem(config: SGLangConfig) -> str | None:
    """Returns why servers cannot be launched in the trainer's environment, with a remedy; None if they can."""
    if config.device == "cuda":
        if importlib.util.find_spec("sglang") is not None:
            return None
        return (
            "SGLang is not installed: run `pip install '.[sglang]'`, or name the interpreter of an environment that "
            "has it in rollout.sglang.python"
        )
    return None if (_CPU_SGLANG / "sglang").is_dir() else f"SGLang is not in {_CPU_SGLANG}: run `make sglang-deps`"


def launch_environment(config: SGLangConfig, *, imports: Path = _PACKAGE.parent) -> dict[str, str]:
    """Returns the environment of a server. imports: directory from which its workers import the weight loader.

    Raises:
        ServerStartError: SGLang is not in this environment, where the servers have none of their own.
    """
    if config.python is None and (problem := installation_problem(config)) is not None:
        raise ServerStartError(f"rollout.backend = sglang: {problem}")
    search_path = [str(imports)]
    if config.python is None:  # the packages on PYTHONPATH are for the trainer's version of Python
        search_path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    # The context with its margin may be longer than the model's; no token is ever in the margin.
    environment |= {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    environment.setdefault(*NCCL_WITHOUT_CUMEM)
    # SGLang closes connections that are idle for 5 seconds: a request that a cut link holds up longer would be lost.
    environment.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", str(math.ceil(config.health_seconds)))
    if config.python is not None:  # its tools compile kernels
        found = shutil.which(config.python) or config.python
        environment["PATH"] = os.pathsep.join([str(Path(found).parent), environment.get("PATH", os.defpath)])
    if config.device == "cuda":
        return environment | {"PYTHONPATH": os.pathsep.join(search_path)}
    if config.python is None:
        search_path.insert(0, str(_CPU_SGLANG))
    environment |= {
        **NO_DEVICES,
        "PYTHONPATH": os.pathsep.join([str(_SHIMS), *search_path]),
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


def server_url(host: str, port: int) -> str:
    """Returns the URL of a server. host: name or address; an IPv6 address gets its brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listening_address(host: str) -> str:
    """Returns the address to listen at for a server that others reach as `host`, a name or an address of this machine.

    An address stays. A name becomes all addresses of its family: this machine's /etc/hosts may map its own name to a
    loopback address, as Debian's does, where other machines find the routable address.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        families = {family for family, *_ in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        families = set()
    return "::" if families == {socket.AF_INET6} else "0.0.0.0"


def choose_port(config: SGLangConfig, index: int) -> int:
    """Returns the port of launched server `index`.

    Raises:
        ServerStartError: The configured port is taken, no port is free, or rollout.sglang.host is no address of this
            machine.
    """
    if config.port is not None:
        ports = [config.port + index]
    else:
        free = _FREE_PORTS[index :: config.num_servers]
        ports = random.SystemRandom().sample(free, k=min(len(free), 100))
    try:
        family = socket.getaddrinfo(config.host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ServerStartError(_no_address(config, error)) from error
    for port in ports:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
                return port
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise ServerStartError(_no_address(config, error)) from error
                taken = error
    raise ServerStartError(
        f"rollout.sglang.port = {config.port}: server {index} cannot listen at {config.host}:{ports[-1]} "
        f"({taken.strerror}); set rollout.sglang.port to another port, or to null for any free port"
    ) from taken


def _no_address(config: SGLangConfig, error: OSError) -> str:
    return (
        f"rollout.sglang.host = {config.host}: this machine has no such address ({error.strerror}); set it to an "
        "address of this machine, or to 127.0.0.1"
    )


class ServerProcess:
    """A server process and its children, in one session that ends with this process, even if it is killed."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path):
        """Starts the process. It ends with the thread that calls this."""
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
        """Process id of the server and of its process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(f"    {line[:300]}" for line in lines)

    def stop(self) -> None:
        """Ends the server and its children; returns when the server is gone."""
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
