"""Runs the rollout servers of one node of a SLURM job.

    python -m oreal_megatron.cli.serve --announce DIR experiment=...

The batch script starts this on every server node. It launches the node's servers, writes their URLs into DIR, restarts
servers that end, and stops them when it is stopped. The trainer attaches to the URLs. Servers start with random weights
from the config.json that the trainer writes into run.dir, and wait for its first publication. Colocated servers are not
started while the trainer uses the devices.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from oreal_megatron.cli.arguments import add_overrides, command_parser
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.planning import planned_geometry
from oreal_megatron.compose import composed, validated
from oreal_megatron.distributed.addresses import choose_gloo_interface
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.planner.memory import tokens_beside_trainer
from oreal_megatron.slurm.node_servers import NodeServers, servers_of_node


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the servers until SIGTERM or SIGINT. Exit status 1: every server failed."""
    parser = command_parser(
        "python -m oreal_megatron.cli.serve",
        "Runs the rollout servers of one node until it is stopped.",
        example="python -m oreal_megatron.cli.serve --announce urls experiment=arithmetic_sglang",
    )
    add_overrides(parser)
    parser.add_argument(
        "--announce", type=Path, required=True, metavar="DIR", help="directory for the URLs, a file each"
    )
    parser.add_argument("--node", type=int, default=os.environ.get("SLURM_NODEID", 0), help="number of this node")
    parser.add_argument(
        "--nodes", type=int, default=os.environ.get("SLURM_STEP_NUM_NODES", 1), help="number of server nodes"
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("SLURMD_NODENAME", "127.0.0.1"),
        help="name of this node, which listens at all of its addresses, or one address of it",
    )
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {socket.gethostname()} %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run_command(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    raw = composed(arguments.overrides, config_dir=arguments.config_dir)
    config = validated(shrunk(raw) if is_dry_run(raw) else raw)
    servers = config.rollout.sglang
    if servers is None:
        raise ValueError("rollout.sglang is null: this run has no servers. Choose an experiment with servers.")
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    # The trainer's hosts, of which this one may be the first, are where its servers have peers (slurm/train.sbatch).
    choose_gloo_interface(os.environ.get("OREAL_TRAINERS", "").split(","))
    own = servers_of_node(servers.num_servers, arguments.node, arguments.nodes)
    kv_tokens = tokens_beside_trainer(config, servers, planned_geometry(config)) if servers.shares_gpus else None
    logs = arguments.announce.parent
    node = NodeServers(config, servers, own, host=arguments.host, logs=logs, kv_tokens=kv_tokens, ending=ending)
    node.announce(arguments.announce)
    return node.run()


if __name__ == "__main__":
    main()
