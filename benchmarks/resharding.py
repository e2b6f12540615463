"""Publications of a 0.5B-shaped bf16 model: trainer TP2 x PP2 over gloo to one SGLang server of TP2, all on CPU.

    python -m benchmarks.resharding

The transports take turns; medians over pairs. Then changes alone (rollout.sglang.full_every) after updates of several
learning rates: fp32 weights that bf16 rounds to the model's are drawn evenly, and each moves by the learning rate, up
or down. That is AdamW's first step; later steps are smaller on the average. Then a simulation of the 32B setting on
given link speeds, which moves nothing.

Limits: direct's transfer at most half of broadcast's, its bytes the lower bound, everything but transfer and audit
under 0.5 s, extra memory of a process under two buckets.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import GeometryConfig, ModelConfig, ParallelConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.distributed.cpu_backend import cpu_backend, peak_memory, reset_peak_memory
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.virtual_stages import chunks_of
from oreal_megatron.rollout.build_sglang import build_sglang_engine
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.server_kinds import LaunchedServer
from oreal_megatron.stopping import StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.weight_sync.p2p import rounds
from oreal_megatron.weight_sync.planner import num_elements, plan_resharding
from oreal_megatron.weight_sync.publisher import build_publisher
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from oreal_megatron.weight_sync.source import PolicyShards

WORLD, SERVER_RANKS = 4, 2
LEARNING_RATES = (1e-7, 5e-7, 1e-6, 5e-6, 1e-5)
PARTS = ("pause", "plan", "transfer", "load", "audit", "continue")
VOCABULARY = 151936
QWEN_05B = GeometryConfig(
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    head_dim=64,
    vocab_size=VOCABULARY,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    tied_embeddings=True,
    init_std=0.02,
)
QWEN_32B = QWEN_05B.model_copy(
    update={
        "num_layers": 64,
        "hidden_size": 5120,
        "ffn_hidden_size": 27648,
        "num_attention_heads": 40,
        "num_query_groups": 8,
        "head_dim": 128,
        "vocab_size": 152064,
        "tied_embeddings": False,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--layers", type=int, default=QWEN_05B.num_layers, help="of the model, to try it out")
    parser.add_argument("--transports", nargs="+", default=["direct", "broadcast", "disk", "ipc"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        torch.multiprocessing.spawn(trainer, (free_port(), arguments, Path(name)), nprocs=WORLD)
    simulate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def trainer(rank: int, port: int, arguments: argparse.Namespace, directory: Path) -> None:
    where = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    layout = ParallelConfig(tensor=2, pipeline=2, micro_batch_tokens=64, timeout_seconds=1200)
    geometry = QWEN_05B.model_copy(update={"num_layers": arguments.layers})
    with devices_hidden(), cpu_backend(), parallel_groups(layout, seed=0) as groups:
        model = ModelConfig(
            path=None,
            geometry=geometry,
            tokenizer="unused",
            implementation="local",
            dtype="bfloat16",
            max_sequence_length=128,
        )
        policy = build_policy(geometry, model, groups, vocab_size=VOCABULARY, seed=0)
        measure(groups, policy, geometry, arguments, directory)


def measure(
    groups: ParallelGroups, policy: Any, geometry: GeometryConfig, arguments: argparse.Namespace, directory: Path
) -> None:
    options = (
        f"tensor={SERVER_RANKS}",
        "control_seconds=600",
        f"bucket_mib={arguments.bucket_mib}",
        "arguments={max-total-tokens:1024,disable-overlap-schedule:true}",
    )
    overrides = ["experiment=arithmetic", "rollout=sglang_cpu", "parallel.timeout_seconds=1200"]
    overrides += [f"rollout.sglang.{option}" for option in options]
    servers = validated(composed(overrides)).rollout.sglang
    assert servers is not None
    engine = build_sglang_engine(
        servers,
        policy,
        geometry,
        groups,
        directory=directory,
        stop=StopRequest(),
        timeline=Timeline(),
        dtype="bfloat16",
        stop_token_id=0,
        max_sequence_length=128,
        timeout_seconds=1200,
    )
    shards = PolicyShards(chunks_of(policy), geometry, groups)
    publishers = {
        name: build_publisher(
            servers.model_copy(update={"transport": name}),
            shards,
            directory=directory / "disk",
            config_json=engine.pool.config_json,
        )
        for name in arguments.transports
    }
    try:
        reports = taken(engine, publishers, groups, arguments.pairs)
        engine.publisher = build_publisher(
            servers.model_copy(update={"full_every": 10**6}),
            shards,
            directory=directory,
            config_json=engine.pool.config_json,
        )
        changes = {rate: taken_by_changes(engine, shards, rate, arguments.pairs) for rate in LEARNING_RATES}
    finally:
        engine.close()
    if groups.is_main:
        plan = plan_resharding(shards.table, shards.geometry, shards.layout, SGLangLayout(tensor=SERVER_RANKS))
        lower_bound = sum(tensor.num_elements for tensors in plan.targets for tensor in tensors) * 2
        show(reports, lower_bound, arguments.bucket_mib)
        show_changes(changes, lower_bound)


def taken(
    engine: SGLangEngine, publishers: dict[str, Any], groups: ParallelGroups, pairs: int
) -> dict[str, list[dict[str, float]]]:
    """By transport: what each publication reports, the first ones, which join groups, apart at index 0."""
    reports = defaultdict(list)
    version = 0
    for _ in range(1 + pairs):
        for name, publisher in publishers.items():
            engine.publisher = publisher
            workers = server_processes(engine.pool) if groups.is_main and version else []
            before = started(workers)
            report = dict(engine.publish(version))
            version += 1
            if not report["publication/servers"]:
                raise SystemExit(f"{name} did not reach the server")
            own = (peak_memory() or 0) - before[0]
            growth = [peak - start for start, peak in zip(before[1:], map(peak_of, workers), strict=True)]
            mine = [max(own, *growth, 0) if growth else own]
            report["extra_bytes"] = float(max(most for part in groups.gather_over_world(mine) for most in part))
            reports[name].append(report)
    return reports


def taken_by_changes(engine: SGLangEngine, shards: PolicyShards, rate: float, pairs: int) -> list[dict[str, float]]:
    """Pairs of publications, one after the other: of all weights after an update, and of the changes of the next."""
    reports: list[dict[str, float]] = []
    for _ in range(2 * pairs):
        update(shards, rate)
        if len(reports) % 2 == 0:
            engine.publisher._transport._num_sent = 10**6  # type: ignore[attr-defined]  # all weights are due
        reports.append(dict(engine.publish(engine.weight_version + 1)))
        if not reports[-1]["publication/servers"] or reports[-1]["publication/failures"]:
            raise SystemExit(f"changes by a learning rate of {rate} did not reach the server")
    return reports


@torch.no_grad()
def update(shards: PolicyShards, rate: float) -> None:
    """Moves every weight by `rate`, up or down, from a place within the interval that bf16 rounds to it."""
    generator = torch.Generator().manual_seed(0)
    for weight in shards.tensors().values():
        exact = weight.float()
        spacing = torch.ldexp(torch.ones(()), torch.frexp(exact).exponent - 8)
        exact += spacing * (torch.rand(exact.shape, generator=generator) - 0.5)
        exact += rate * (torch.randint(0, 2, exact.shape, generator=generator) * 2 - 1)
        weight.copy_(exact)


def server_processes(pool: ServerPool) -> list[psutil.Process]:
    (server,) = pool.servers
    assert isinstance(server, LaunchedServer)
    process = server.process
    assert process is not None
    return psutil.Process(process.pid).children(recursive=True)


def started(workers: list[psutil.Process]) -> list[int]:
    """The resident sets of this process and of `workers`, from which their next peaks are measured."""
    reset_peak_memory()
    for worker in workers:
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5")
    return [psutil.Process().memory_info().rss, *(worker.memory_info().rss for worker in workers)]


def peak_of(worker: psutil.Process) -> int:
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def show(reports: dict[str, list[dict[str, float]]], lower_bound: int, bucket_mib: int) -> None:
    print(f"\n{'seconds (medians)':<18}" + "".join(f"{part:>10}" for part in PARTS) + f"{'MB':>9}{'extra MiB':>11}")
    for name, (first, *later) in reports.items():
        medians = [
            statistics.median(report.get(f"publication/{part}_seconds", 0.0) for report in later) for part in PARTS
        ]
        extra = max(report["extra_bytes"] for report in (first, *later)) / 2**20
        sent = later[0]["publication/bytes"] / 1e6
        print(f"{name:<18}" + "".join(f"{value:>10.3f}" for value in medians) + f"{sent:>9.1f}{extra:>11.0f}")
        first_transfer = first["publication/transfer_seconds"]
        print(f"{'  the first one':<18}{'':>20}{first_transfer:>10.3f}   (joins groups, allocates buckets)")
    direct = reports["direct"][1:]
    for name in (other for other in reports if other != "direct"):
        ratios = [
            (d["publication/transfer_seconds"] + d["publication/load_seconds"])
            / (o["publication/transfer_seconds"] + o["publication/load_seconds"])
            for d, o in zip(direct, reports[name][1:], strict=True)
        ]
        print(f"direct's transfer and load / {name}'s: median of pairs {statistics.median(ratios):.3f}")
    rest = statistics.median(
        sum(report.get(f"publication/{part}_seconds", 0.0) for part in PARTS if part not in ("transfer", "audit"))
        for report in direct
    )
    extra = max(report["extra_bytes"] for report in reports["direct"]) / 2**20
    share = statistics.median(
        report["publication/audit_seconds"] / report["publication/transfer_seconds"] for report in direct
    )
    print(f"direct: audit / transfer, median {share:.3f} (aim 0.25)")
    print(f"direct: all but transfer and audit {rest:.3f} s (limit 0.5)")
    print(f"direct: {direct[0]['publication/bytes']:.0f} bytes, lower bound {lower_bound}")
    print(f"direct: extra memory of the process that grew most {extra:.0f} MiB (limit {2 * bucket_mib})")


def show_changes(changes: dict[float, list[dict[str, float]]], lower_bound: int) -> None:
    print(f"\n{'changes alone':<18}{'MB':>10}{'of all':>10}{'transfer s':>12}{'of all':>10}{'audit s':>10}")
    for rate, reports in changes.items():
        whole, changed = reports[::2], reports[1::2]
        sent = statistics.median(report["publication/bytes"] for report in changed)
        seconds = [
            [sum(report[f"publication/{part}_seconds"] for part in ("transfer", "load")) for report in side]
            for side in (changed, whole)
        ]
        ratio = statistics.median(few / all_ for few, all_ in zip(*seconds, strict=True))
        audit = statistics.median(report["publication/audit_seconds"] for report in changed)
        print(
            f"{f'  rate {rate:g}':<18}{sent / 1e6:>10.1f}{sent / lower_bound:>10.1%}"
            f"{statistics.median(seconds[0]):>12.3f}{ratio:>10.2f}{audit:>10.3f}"
        )


def simulate() -> None:
    """The 32B setting: every pair's bytes at the speed of a link, in the order in which p2p.py moves them."""
    table = family_of(QWEN_32B).table(QWEN_32B, "causal")
    trainer, num_servers = Layout(tensor=8, pipeline=4, data=4), 8
    plan = plan_resharding(table, QWEN_32B, trainer, SGLangLayout(tensor=8))
    num_receivers = num_servers * plan.tensor
    sizes = {pair: 2 * num_elements(ops) for pair, ops in plan.assign(num_servers).items()}
    out: dict[int, int] = defaultdict(int)
    into: dict[int, int] = defaultdict(int)
    for (sender, receiver), size in sizes.items():
        out[sender] += size
        into[receiver] += size
    # The weights of a stage are on its own ranks only, so no sender can have less than the mean of its stage.
    per_stage = trainer.num_ranks // trainer.pipeline
    bound = max(
        sum(out[rank] for rank in range(first, first + per_stage)) / per_stage
        for first in range(0, trainer.num_ranks, per_stage)
    )
    print("\nSimulation, nothing is moved: Qwen2.5-32B in bf16, TP8 PP4 DP4 to 8 servers of TP8")
    print(
        f"{sum(sizes.values()) / 1e9:.1f} GB between {plan.num_senders + num_receivers} processes in {len(sizes)} "
        f"pairs; busiest sender {max(out.values()) / 1e9:.2f} GB, the busiest stage's mean {bound / 1e9:.2f} GB"
    )
    for gigabits in (200, 400):
        speed = gigabits / 8 * 1e9
        free: dict[tuple[str, int], float] = defaultdict(float)
        for sender, receiver in rounds(sizes, plan.num_senders, num_receivers):
            end = max(free["s", sender], free["r", receiver]) + sizes[sender, receiver] / speed
            free["s", sender] = free["r", receiver] = end
        limit = max(*out.values(), *into.values()) / speed
        print(
            f"{gigabits} Gb/s a process: {max(free.values()):.3f} s, physical limit {limit:.3f} s "
            f"(the largest of what one process sends or receives)"
        )


if __name__ == "__main__":
    main()
