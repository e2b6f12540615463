"""A sender and a receiver of all weights of a small model, in a process each: `BACKEND DTYPE` under torchrun."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.weight_sync.p2p import Receiver, Rendezvous, Sender, join
from oreal_megatron.weight_sync.planner import ops_by_receiver, ops_by_sender, plan_resharding
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from tests.unit.weight_sync.test_planner import huggingface_weights, served, trainer_shards

GEOMETRY = GeometryConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=100
)
BUCKET_BYTES = 4096


def main(backend: str, dtype: torch.dtype) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    box = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None]
    ports = [box[0].port if box[0] else 0]
    dist.broadcast_object_list(ports, src=0)
    rendezvous = Rendezvous("127.0.0.1", ports[0], "test", num_senders=1, num_receivers=1, timeout_seconds=60)

    table, trainer, server = family_of(GEOMETRY).table(GEOMETRY, "causal"), Layout(), SGLangLayout()
    plan = plan_resharding(table, GEOMETRY, trainer, server)
    assignment = plan.assign(1)
    # bfloat16 holds whole numbers up to 256 exactly.
    weights = {name: values % 251 for name, values in huggingface_weights(table).items()}
    group = join(rendezvous, rank, backend)
    options = {"dtype": dtype, "bucket_bytes": BUCKET_BYTES}
    if rank == 0:
        shards = trainer_shards(table, GEOMETRY, trainer, weights)[0]
        sender = Sender(group, rendezvous, 0, ops_by_receiver(assignment, 0), **options)
        sender.send({name: torch.from_numpy(s).to(device, dtype) for name, s in shards.items()})
    else:
        parameters = {t.name: torch.zeros(t.shape, dtype=dtype, device=device) for t in plan.targets[0]}
        receiver = Receiver(group, rendezvous, 0, ops_by_sender(assignment, 0), **options)
        receiver.receive(parameters, lambda run: None)
        for name, values in served(weights, GEOMETRY, server, 0).items():
            np.testing.assert_array_equal(parameters[name].float().cpu().numpy(), values, err_msg=name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]))
