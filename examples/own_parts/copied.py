"""A transport of one's own: servers that share no file system with the trainer load a copy of the weights."""

import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from oreal_megatron.weight_sync.disk import DiskTransport
from oreal_megatron.weight_sync.types import TransferFailure, TransferResult, failure_of_answer


class Copy(BaseModel):
    """Way of the directory to a server."""

    command: tuple[str, ...]
    """Command that copies, such as [rsync, -a, --delete, "{source}/", "{host}:{target}"]."""
    target: Path
    """Directory on the server's machine."""


class Copied:
    """Writes a Hugging Face directory, copies it to each server's machine, and has the server load the copy."""

    def __init__(self, *, shards, directory, config_json, settings: Copy):
        self.shards, self.settings = shards, settings
        self.disk = DiskTransport(shards, directory, config_json=config_json)

    def prepare(self, weight_version):
        """Writes the directory while servers still generate; each trainer rank writes its part."""
        self.disk.prepare(weight_version)

    def send(self, servers):
        """Copies on the main rank, and returns the same result on every rank."""
        start, failures, answers = time.perf_counter(), {}, {}
        for server in servers if self.shards.groups.is_main else ():
            host, target = urlsplit(server.name).hostname, self.settings.target
            command = [
                part.format(source=self.disk.current, host=host, target=target) for part in self.settings.command
            ]
            copied = subprocess.run(command, capture_output=True, text=True)
            if copied.returncode:
                failures[server.name] = TransferFailure(f"{command[0]}: {copied.stderr}")
            else:
                answers[server.name] = server.update_weights_from_disk(target)
        failures |= {name: failed for name, answer in answers.items() if (failed := failure_of_answer(answer))}
        seconds = {"transfer": time.perf_counter() - start}
        return TransferResult(
            failures=self.shards.groups.from_main(failures), num_bytes=self.shards.num_bytes, seconds=seconds
        )

    def close(self):
        """Does nothing: the copies stay."""
