"""Runs the commands of a page of the documentation, those of its ```bash blocks, in a directory.

python tools/run_page.py docs/tutorial.md runs/tutorial
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands(page: str) -> str:
    """Returns the content of the bash blocks of a page, one after the other."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE))


def run(script: str, directory: Path) -> int:
    """Runs bash commands in a directory, which is made, up to the first that fails; returns the exit status.

    Each command is printed before it runs. It finds the programs of this Python's environment, and the repository as
    $REPOSITORY.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "REPOSITORY": str(ROOT)}
    command = ["bash", "-veuo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=directory, env=environment).returncode


def main() -> None:
    """Runs the page of the first argument in the directory of the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    sys.exit(run(commands(arguments.page.read_text()), arguments.directory))


if __name__ == "__main__":
    main()
