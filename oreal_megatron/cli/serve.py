"""The rollout servers of one node of a job.

    python -m oreal_megatron.cli.serve --announce DIR experiment=...

The batch script starts it once on every node that serves; it starts the node's servers, writes each one's URL into DIR,
starts a server anew that ends, and ends them all with itself. The trainer attaches to the URLs. Servers start with
random weights, from the config.json that the trainer writes into run.dir, and wait for it to publish. Where they share
its devices, none is started while these are the trainer's.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
from pathlib import Path

from oreal_megatron.cli.errors import reporting
from oreal_megatron.compose import composed, validated
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.slurm.node_servers import NodeServers, servers_of_node


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m oreal_megatron.cli.serve",
        description="Runs the rollout servers of one node until it is asked to end.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for oreal-train")
    parser.add_argument("--announce", type=Path, required=True, metavar="DIR", help="where the URLs go, one file each")
    parser.add_argument("--node", type=int, default=os.environ.get("SLURM_NODEID", 0), help="which of the nodes")
    parser.add_argument("--nodes", type=int, default=os.environ.get("SLURM_STEP_NUM_NODES", 1), help="that serve")
    parser.add_argument("--host", default=os.environ.get("SLURMD_NODENAME", "127.0.0.1"), help="address to listen at")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {socket.gethostname()} %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    reporting(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    raw = composed(arguments.overrides)
    config = validated(shrunk(raw) if is_dry_run(raw) else raw)
    servers = config.rollout.sglang
    if servers is None:
        raise ValueError("rollout.sglang: this run has no servers")
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    own = servers_of_node(servers.num_servers, arguments.node, arguments.nodes)
    node = NodeServers(config, servers, own, host=arguments.host, logs=arguments.announce.parent, ending=ending)
    node.announce(arguments.announce)
    return node.run()


if __name__ == "__main__":
    main()
