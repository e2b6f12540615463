"""The lock files fit setup.py, and the environments for GPUs resolve anew. uv reads metadata and installs nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

REQUIREMENTS = ROOT / "requirements"
LOCKS = ("cpu", "cuda13", "servers")
SOURCES = ("antlr4-python3-runtime", "transformer-engine-torch")
"""Packages without wheels. The first is pure Python."""
TEST_PACKAGES = ("hypothesis", "iniconfig", "pluggy", "pytest", "sortedcontainers")
"""Packages of tests, which no lock file for GPUs has."""
_UNREACHABLE = ("error sending request", "dns error", "Failed to fetch", "Connection refused")


def pins(lock: Path) -> dict[str, str]:
    """Package -> version, of a lock file."""
    lines = lock.read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def uv(*arguments: str) -> str:
    """Runs uv and returns its output. Skips the test, with the reason, where there is no uv or no package index."""
    if (path := shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")) is None:
        pytest.skip("uv is not installed: the environments were not resolved (pip install uv)")
    found = subprocess.run([path, *arguments, "--quiet"], cwd=ROOT, capture_output=True, text=True)
    if any(word in found.stderr for word in _UNREACHABLE):
        pytest.skip(f"no package index answers: the environments were not resolved ({found.stderr.splitlines()[-1]})")
    assert found.returncode == 0, f"uv {shlex.join(arguments)} finds no environment:\n{found.stderr}"
    return found.stdout


def compiled(lock: Path, *, python: str | None = None) -> dict[str, str]:
    """Runs the command that a lock file begins with, and returns the pins that it writes to `lock`.

    lock: the command keeps the pins that are there already. python: another version of Python for the environment.
    """
    header = (REQUIREMENTS / lock.name).read_text().splitlines()[1]
    command = shlex.split(header.removeprefix("#"))
    command[command.index("-o") + 1] = str(lock)
    if python is not None:
        command[command.index("--python-version") + 1] = python
    assert command[0] == "uv"
    uv(*command[1:])
    return pins(lock)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_is_what_make_lock_writes(tmp_path, name):
    shutil.copy(REQUIREMENTS / f"{name}.lock", lock := tmp_path / f"{name}.lock")
    assert compiled(lock) == pins(REQUIREMENTS / f"{name}.lock"), "setup.py has changed: run `make lock`"


@pytest.mark.parametrize(
    ("name", "python"), [("cuda13", "3.11"), ("cuda13", "3.12"), ("cuda13", "3.13"), ("servers", "3.12")]
)
def test_an_environment_for_gpus_resolves_anew(tmp_path, name, python):
    found = compiled(tmp_path / f"{name}.lock", python=python)
    assert {"torch", "sglang", "nvidia-nccl-cu13"} <= found.keys()


@pytest.mark.parametrize(("name", "python"), [("cpu", "3.11"), ("cuda13", "3.12")])
def test_locked_packages_come_as_wheels(name, python):
    """No environment needs a compiler, except for Transformer Engine's extension, which is compiled beside torch."""
    platform = ("--python-version", python, "--python-platform", "x86_64-manylinux_2_34")
    sources = (f"--no-binary={package}" for package in SOURCES)
    found = uv("pip", "compile", f"requirements/{name}.lock", "--no-deps", *platform, "--only-binary=:all:", *sources)
    assert found.count("==") == len(pins(REQUIREMENTS / f"{name}.lock"))


def test_trainer_and_servers_have_the_same_nccl_and_sglang():
    together, apart = pins(REQUIREMENTS / "cuda13.lock"), pins(REQUIREMENTS / "servers.lock")
    for name in ("nvidia-nccl-cu13", "torch", "sglang"):
        assert together[name] == apart[name], name


def test_lock_files_name_no_package_index():
    for name in LOCKS:
        assert "://" not in (REQUIREMENTS / f"{name}.lock").read_text(), name


def test_servers_lock_has_what_a_servers_worker_imports():
    """Servers import the weight loader from the trainer's checkout, with the packages of their own environment."""
    code = "import sys; import oreal_megatron.weight_sync.worker; print({name.split('.')[0] for name in sys.modules})"
    loaded = ast.literal_eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    own = {re.sub(r"[-.]", "_", name) for name in pins(REQUIREMENTS / "servers.lock")} | {"oreal_megatron"}
    # By distribution, since a module may have another name: a torch for CUDA imports `cuda` of cuda-bindings.
    installed = importlib.metadata.packages_distributions()
    names = {module: {re.sub(r"[-.]", "_", name.lower()) for name in installed.get(module, ())} for module in loaded}
    assert not {module: found for module, found in names.items() if found and not found & own}


def with_requirements(*names: str) -> set[str]:
    """Packages of this environment with all that they require, without extras."""
    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            parsed = map(Requirement, importlib.metadata.requires(name) or [])
            left += [canonicalize_name(r.name) for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def one_gpu_packages() -> list[str]:
    lines = (REQUIREMENTS / "one_gpu.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_one_gpu_script_imports_what_its_wheels_and_torch_bring():
    assert set(one_gpu_packages()) <= pins(REQUIREMENTS / "cuda13.lock").keys() | {*TEST_PACKAGES}
    left = sorted({"oreal-megatron", *one_gpu_packages(), *with_requirements("torch", "transformers")})
    command = [sys.executable, "-W", "ignore", "-m", "tests.environments.hidden_packages", "tests.gpu.one_gpu", *left]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
