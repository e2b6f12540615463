"""The checks of tests/gpu/one_gpu.py. Each returns its figures, or raises with the figure that is not right.

A check computes on the device of its process; what it compares with is computed by other processes, on the CPU or on
the device.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from benchmarks.memory_rank import Peaks, Trainer
from oreal_megatron.cli.planning import planner_of
from oreal_megatron.compose import composed, resolved
from oreal_megatron.config import GeometryConfig, ModelConfig, ParallelConfig, TrainConfig, parse_config
from oreal_megatron.data.packing import SequenceCost
from oreal_megatron.distributed.cpu_backend import cpu_backend, device
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.gpt import DTYPES, transformer_config
from oreal_megatron.models.packed_row import PackedRow
from oreal_megatron.models.sdpa_attention import SdpaCoreAttention
from oreal_megatron.planner.hardware import FULL, device_named
from tests.distributed import publication_worker
from tests.parity import oreal_step
from tests.tiny_models import save_tiny

Figures = dict[str, Any]
LAYOUT = ParallelConfig(
    tensor=1, pipeline=1, micro_batch_tokens=512, timeout_seconds=120, distributed_optimizer=True,
    overlap_grad_reduce=True, offload=True,
)  # fmt: skip
NUM_SEQUENCES = 32
"""Of 4 to 129 tokens."""
# The largest differences between devices in fp32: metrics relative, weights absolute, log-probabilities in nats. Two
# updates move a weight by 2e-3.
TOLERANCES = {"metrics": 1e-3, "weights": 2e-5, "generation": 1e-3}
BF16_FACTOR = 3
"""Times the CPU's own error in bf16 that the device may be away from fp32."""
EQUAL_SHARE = 0.99
"""Share of the weights that a resumed run has to the bit. Without AdamW's moments most would differ."""
PLAN_ERROR = 0.15
PEAK = device_named("h100_80gb", sharing=1).flops or 0.0


def machine(small: bool) -> Figures:
    """The device and the versions."""
    packages = ("megatron-core", "transformers", "triton", "numpy")
    found: Figures = {"device": "CPU", "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "count": torch.cuda.device_count()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def attention(small: bool) -> Figures:
    """Packed attention against one masked softmax a segment: values, gradients, and the memory of a long row.

    The last three segments share a prefix, as the responses to a prompt do.
    """
    geometry = GeometryConfig(
        num_layers=1, hidden_size=1280, ffn_hidden_size=64, num_attention_heads=10, num_query_groups=2
    )
    lengths = [1, 2, 17, 18, 19, 300, *([] if small else [1024, 1100, 4096, 6000]), 40, 9, 25, 27]
    prefix = (sum(lengths[:-4]), sum(lengths[:-3]))
    prefixes = [(0, 0)] * (len(lengths) - 3) + [prefix] * 3
    figures: Figures = {}
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        for dtype, tolerance in (("float32", 2e-4), ("bfloat16", 3e-2)):
            config = transformer_config(geometry, _model(geometry, dtype, row=sum(lengths)), groups)
            core = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups.collection)
            q, k, v = inputs = _attention_inputs(sum(lengths), dtype)
            weight = torch.randn(sum(lengths), 1280, device=device())
            (core(q, k, v, None, packed_seq_params=_row(lengths, prefixes)).float() * weight).sum().backward()
            exact = [x.detach().double().requires_grad_() for x in inputs]
            expected = _masked_softmax(*exact, lengths, prefixes)
            (expected * weight).sum().backward()
            found = core(q, k, v, None, packed_seq_params=_row(lengths, prefixes)).detach()
            pairs = [(found, expected.detach()), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
            error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
            assert error < tolerance, f"{dtype}: off by {error:.1e} of the largest value, at most {tolerance:.0e}"
            figures[dtype] = f"{error:.1e}"
        if device().type == "cuda":
            figures["row_of_16384_mib"] = _memory_of_row(core, 16384)
    return figures


def _attention_inputs(tokens: int, dtype: str) -> list[Tensor]:
    """Queries of 10 heads, keys and values of 2 groups, of dimension 128."""
    torch.manual_seed(0)
    shapes = [(tokens, heads, 128) for heads in (10, 2, 2)]
    return [torch.randn(shape, device=device()).to(DTYPES[dtype]).requires_grad_() for shape in shapes]


def _row(lengths: list[int], prefixes: list[tuple[int, int]]) -> PackedRow:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=device()).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) + end - start for n, (start, end) in zip(lengths, prefixes, strict=True)])
    return PackedRow.of(bounds, max(lengths), positions.to(device()), prefixes)


def _masked_softmax(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], prefixes: list[tuple[int, int]]) -> Tensor:
    parts, end = [], 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        start, end = end, end + length
        seen = torch.cat([torch.arange(*prefix), torch.arange(start, end)]).to(q.device)
        a, b, c = (x.transpose(0, 1) for x in (q[start:end], k[seen], v[seen]))
        b, c = (x.repeat_interleave(a.size(0) // x.size(0), 0) for x in (b, c))
        future = torch.ones(length, len(seen), dtype=torch.bool, device=a.device).triu(1 + len(seen) - length)
        scores = (a @ b.transpose(1, 2)) * a.size(2) ** -0.5
        parts.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(parts).flatten(1)


def _memory_of_row(core: SdpaCoreAttention, tokens: int) -> int:
    """MiB of a row of one sequence, forward and backward, above the inputs: its scores alone would be 5 GiB."""
    q, k, v = _attention_inputs(tokens, "bfloat16")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    core(q, k, v, None, packed_seq_params=_row([tokens], [(0, 0)])).sum().backward()
    mib = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    assert mib < 600, f"a row of {tokens} tokens takes {mib} MiB: scores are kept"
    return mib


def step_in_float32(small: bool) -> Figures:
    """Two OREAL steps in fp32 on the device against the CPU."""
    return _against_cpu("float32")


def step_in_bfloat16(small: bool) -> Figures:
    """Two OREAL steps in bf16 on the device, and on the CPU, against fp32."""
    return _against_cpu("bfloat16")


def _against_cpu(dtype: str) -> Figures:
    exact = in_new_process(two_steps, "float32", on_cpu=True)
    rounded = exact if dtype == "float32" else in_new_process(two_steps, dtype, on_cpu=True)
    figures = {}
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        outcome, parameters = _run_steps(groups, dtype)
        for metrics in (*outcome.metrics, *exact.metrics, *rounded.metrics):
            metrics.pop("policy/kl_k1", None)  # terms of both signs, of which nearly everything cancels
        ours = oreal_step.differences(outcome, parameters, exact, groups)
        theirs = oreal_step.differences(rounded, parameters, exact, groups)
    for kind, tolerance in TOLERANCES.items():
        (found, where), limit = ours[kind], tolerance + BF16_FACTOR * theirs[kind][0]
        assert found <= limit, f"{kind} differ by {found:.1e}, at most {limit:.1e}: {where}"
        figures[kind] = f"{found:.1e} (at most {limit:.1e})"
    return figures


def resume(small: bool) -> Figures:
    """A checkpoint that was written while the next step ran, resumed by another process: that step again.

    Sums on a device may differ in their order, which rounds a few weights in bf16 the other way.
    """
    with tempfile.TemporaryDirectory() as name:
        checkpoints = Path(name) / "checkpoints"
        whole = in_new_process(two_steps, "bfloat16", checkpoints)
        with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
            outcome, parameters = _run_steps(groups, "bfloat16", checkpoints, steps=range(1, 2))
            difference, where = oreal_step.differences(outcome, parameters, whole, groups)["metrics"]
    assert difference <= TOLERANCES["metrics"], f"metrics differ by {difference:.1e}: {where}"
    equal = sum(int((weight == whole.weights[name]).sum()) for name, weight in outcome.weights.items())
    share = equal / sum(weight.numel() for weight in outcome.weights.values())
    assert share >= EQUAL_SHARE, f"{share:.2%} of the weights are those of the run that went on"
    return {"metrics": f"{difference:.1e}", "equal weights": f"{share:.2%}"}


def two_steps(dtype: str, checkpoints: Path | None = None) -> oreal_step.Outcome:
    """Two steps in this process, with a checkpoint after the first."""
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        return _run_steps(groups, dtype, checkpoints)[0]


def _run_steps(groups: ParallelGroups, dtype: str, checkpoints: Path | None = None, **options: Any) -> Any:
    model = _model(oreal_step.GEOMETRY, dtype, row=512)
    objective = parse_config(resolved(composed(["run.name=one_gpu", "objective.beta=0.1"]))).objective
    return oreal_step.run_steps(
        groups, objective, tied=False, num_sequences=NUM_SEQUENCES, model=model, checkpoints=checkpoints, **options
    )


def _model(geometry: GeometryConfig, dtype: str, *, row: int) -> ModelConfig:
    return oreal_step.MODEL.model_copy(
        update={"geometry": geometry, "dtype": dtype, "max_sequence_length": row, "logprob_chunk_tokens": 64}
    )


def memory(small: bool) -> Figures:
    """Peaks of a step's phases, on a GPU against the plan, its seconds, and its share of the device's bf16 rate (MFU).

    A model of 1.26B parameters on two rows of 16,384 tokens.
    """
    config = _configuration(small, on_cpu=device().type == "cpu")
    planned = in_new_process(planned_mib, config, on_cpu=True)
    with cpu_backend(), parallel_groups(config.parallel, seed=0) as groups:
        peaks = Peaks()
        trainer = Trainer(config, groups)
        for _ in range(2):  # the second is like all that follow
            sequences = trainer.train(peaks)
    cost = SequenceCost.of_model(trainer.geometry, trainer.vocab_size)
    flops = sum(cost.of(sequence) for sequence in sequences)
    figures: Figures = {"parameters": sum(p.numel() for p in trainer.policy.module.parameters())}
    errors = []
    for phase, measured in peaks.seen.items():
        seconds, passes = peaks.seconds[phase], 1 if phase == "score" else 3
        figures |= {f"{phase} MiB": round(measured), f"{phase} planned MiB": round(planned[phase])}
        figures[f"{phase} seconds"] = round(seconds, 3)
        if device().type == "cuda":  # benchmarks/memory.py measures a CPU
            figures[f"{phase} MFU"] = round(passes * flops / seconds / PEAK, 3)
            figures[f"{phase} plan error"] = round(planned[phase] / measured - 1, 3)
            errors.append(figures[f"{phase} plan error"])
    assert errors or device().type == "cpu", "no phase was measured"
    assert all(FULL - 1 < error < PLAN_ERROR for error in errors), f"the plan is off: {figures}"
    return figures


def _configuration(small: bool, *, on_cpu: bool) -> TrainConfig:
    row, vocabulary = (256, 512) if small else (16384, 65536)
    sizes = (4, 128, 256, 4, 2) if small else (6, 3584, 9472, 28, 4)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    overrides = [f"model.geometry.{name}={size}" for name, size in zip(names, sizes, strict=True)]
    overrides += [f"model.geometry.vocab_size={vocabulary}", f"model.max_sequence_length={row}"]
    overrides += [f"parallel.micro_batch_tokens={row}", "parallel.recompute=full", "model.dtype=bfloat16"]
    overrides += ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]
    overrides += ["objective.actor_freeze_steps=0", "run.name=one_gpu", "rollout.sampling.max_new_tokens=16"]
    resources = "resources=local" if on_cpu else "resources=h100"
    return parse_config(
        resolved(composed(["experiment=arithmetic", resources, "resources.trainer_devices=1", *overrides]))
    )


def planned_mib(config: TrainConfig) -> dict[str, float]:
    """MiB by phase, without CUDA's context and libraries, which torch does not count."""
    phases = planner_of(config)(config).memory.phases
    return {memory.phase: (memory.total - memory.parts.get("framework", 0)) / 2**20 for memory in phases}


def transports(small: bool) -> Figures:
    """Weights to a process on the same device, by NCCL point to point and by CUDA's IPC handles, bit for bit."""
    shape = {"hidden_size": 128, "ffn": 512, "head_dim": 64, "num_groups": 4}
    kinds = ("direct", "ipc", "direct")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        source = save_tiny(Path(name) / "model", "qwen3", tied=False, **shape)
        setting = publication_worker.Setting(
            layout={"tensor": 1, "pipeline": 1}, world=1, served="bfloat16", num_servers=1, server_ranks=1,
            transports=kinds, device=device().type, bucket_bytes=2**17,
        )  # fmt: skip
        publication_worker.main(source, setting)
    return {"published": " ".join(kinds), "seconds": round(time.perf_counter() - begun, 1)}


def in_new_process(function: Callable[..., Any], *arguments: Any, on_cpu: bool = False) -> Any:
    """What the function returns in a process of its own; on_cpu: in which there is no GPU."""
    # Without CUDA a fork need not import everything again.
    method = "spawn" if device().type == "cuda" else "fork"
    with devices_hidden(when=on_cpu), ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        return pickle.loads(pool.submit(_pickled, function, arguments).result())


def _pickled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    # As bytes: tensors as objects would be handles to this process' memory.
    return pickle.dumps(function(*arguments))
