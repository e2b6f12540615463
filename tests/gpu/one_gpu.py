"""What one GPU can show in eight minutes, without a network, Transformer Engine or SGLang.

    python -m tests.gpu.one_gpu [--device cpu] [--small] [--only CHECK ...] [--output one_gpu.json]

Prints a line a check with its figures, and writes them as JSON with the name of the device and versions. A check is a
process of its own with a limit of time, so a failure, a crash or a hang stops no other. Status 1 where a check failed.
`--device cpu --small` runs the same checks where there is no GPU, in a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.distributed.environment import NCCL_WITHOUT_CUMEM, devices_hidden
from tests.gpu import one_gpu_checks as checks

Figures = dict[str, Any]
# name -> (seconds that it may take, the check). The seconds add up to eight minutes.
CHECKS: dict[str, tuple[int, Callable[[bool], Figures]]] = {
    "machine": (30, checks.machine),
    "attention": (60, checks.attention),
    "step_float32": (70, checks.step_in_float32),
    "step_bfloat16": (70, checks.step_in_bfloat16),
    "resume": (60, checks.resume),
    "memory": (130, checks.memory),
    "transports": (60, checks.transports),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS)
    )
    parser.add_argument("--output", type=Path, default=Path("one_gpu.json"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; for a CPU there is `--device cpu --small`")
    os.environ.setdefault(*NCCL_WITHOUT_CUMEM)
    report: dict[str, Figures] = {}
    with devices_hidden(when=arguments.device == "cpu"):
        for name in arguments.only:
            report[name] = outcome(name, arguments.device, small=arguments.small)
            arguments.output.write_text(json.dumps({"device": arguments.device, "checks": report}, indent=1) + "\n")
            print(line(name, report[name]), flush=True)
    failed = [name for name, found in report.items() if not found["passed"]]
    print(f"{len(report) - len(failed)} of {len(report)} checks passed; figures in {arguments.output}")
    sys.exit(1 if failed else 0)


def outcome(name: str, device: str, *, small: bool) -> Figures:
    """Runs a check in a process group of its own, and ends what it leaves behind.

    Returns whether it passed, its seconds, and its figures or its problem with the end of its output.
    """
    limit, check = CHECKS[name]
    # CUDA cannot be used in a fork; without it, a fork need not import everything again.
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    with tempfile.TemporaryDirectory() as scratch:
        output, answer = Path(scratch, "output"), Path(scratch, "answer.json")
        process = context.Process(target=answer_of, args=(check, small, output, answer))
        begun = time.monotonic()
        process.start()
        process.join(limit)
        seconds, hangs = round(time.monotonic() - begun, 1), process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        if answer.is_file():
            return {"passed": True, "seconds": seconds, "figures": json.loads(answer.read_text())}
        said = output.read_text(errors="replace").strip() if output.is_file() else ""
        end = f"it took more than {limit} s" if hangs else f"exit code {process.exitcode}"
        return {"passed": False, "seconds": seconds, "problem": f"{end}: {said[-300:]}", "output": said[-4000:]}


def answer_of(check: Callable[[bool], Figures], small: bool, output: Path, answer: Path) -> None:
    """Runs a check in this process, whose output goes to a file."""
    os.setpgid(0, 0)
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    for stream in (1, 2):  # of libraries and of further processes
        os.dup2(sys.stdout.fileno(), stream)
    try:
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(check(small)))
        partial.rename(answer)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def line(name: str, found: Figures) -> str:
    """A check's line: name, PASS or FAIL, seconds, figures or problem."""
    figures = found.get("figures", {})
    text = (
        found["problem"].replace("\n", " | ")
        if not found["passed"]
        else ", ".join(f"{key} {value}" for key, value in figures.items())
    )
    return f"{name:14}{'PASS' if found['passed'] else 'FAIL'}{found['seconds']:7.1f} s  {text}"


if __name__ == "__main__":
    main()
