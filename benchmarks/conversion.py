"""Converting a random checkpoint of 1.5B parameters in bf16 (3 GB) both ways, against copying the files with fsync.

    python -m benchmarks.conversion

Prints the ratio of conversion and copy (medians of pairs in one run; fixed start-up apart), and the peak of anonymous
and shared memory above the imports. Limits: 60% of the copy's speed, 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="conversions and copies of each direction, in turn")
    parser.add_argument("--layers", type=int, default=28, help="fewer: a smaller model")
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--convert", nargs=3, metavar=("WAY", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(*arguments.convert)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        run(Path(directory), arguments.pairs, arguments.layers)


def run(directory: Path, num_pairs: int, num_layers: int) -> None:
    source = random_checkpoint(directory / "hf", num_layers)
    kept = {"to_megatron": directory / "megatron", "to_huggingface": directory / "back"}
    for way, origin in (("to_megatron", source), ("to_huggingface", kept["to_megatron"])):
        target, ratios, figures = kept[way], [], []
        for _ in range(num_pairs):
            shutil.rmtree(target, ignore_errors=True)
            seconds_of_copy = copy_with_fsync(origin, directory / "copy")
            measured = measured_conversion(way, origin, target)
            ratios.append(seconds_of_copy / measured["seconds"])
            figures.append((seconds_of_copy, measured))
        report(way, origin, ratios, figures)


def report(way: str, origin: Path, ratios: list[float], figures: list[tuple[float, dict[str, float]]]) -> None:
    size = sum(file.stat().st_size for file in origin.rglob("*") if file.is_file())
    copies, conversions = zip(*figures, strict=True)
    seconds, start_up = (statistics.median(m[key] for m in conversions) for key in ("seconds", "start_up_seconds"))
    print(
        f"{way}: {size / 1e9:.2f} GB at {100 * statistics.median(ratios):.0f}% of the copy's speed (limit 60%; pairs "
        f"{', '.join(f'{100 * ratio:.0f}%' for ratio in ratios)}); {seconds:.1f} s against "
        f"{statistics.median(copies):.1f} s; start-up {start_up:.1f} s; peak "
        f"{max(m['peak_bytes'] for m in conversions) / 1e9:.2f} GB above the imports (limit 1.5 GB)",
        flush=True,
    )


def random_checkpoint(path: Path, num_layers: int) -> Path:
    import torch

    from oreal_megatron.conversion.huggingface import read_model
    from oreal_megatron.conversion.weights import plan_shards

    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": num_layers}))
    origins = read_model(path).table.origins
    (shard,), _ = plan_shards({name: (o.shape, torch.bfloat16) for name, o in origins.items()}, 10**12)
    with open(path / shard.file, "wb") as stream:
        stream.write(shard.header())
        noise = torch.randn(2**25).to(torch.bfloat16).view(torch.uint8).numpy().data
        left = shard.num_bytes
        while left:
            left -= stream.write(noise[: min(left, len(noise))])
        os.fsync(stream.fileno())
    return path


def copy_with_fsync(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)
        with open(copied, "rb+") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def measured_conversion(way: str, source: Path, target: Path) -> dict[str, float]:
    """In a process of its own: seconds of the conversion alone, of start-up, and its peak memory."""
    os.sync()
    command = [sys.executable, "-m", "benchmarks.conversion", "--convert", way, str(source), str(target)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured | {"start_up_seconds": time.perf_counter() - start - measured["seconds"]}


def convert(way: str, source: str, target: str) -> None:
    from oreal_megatron.conversion import convert
    from oreal_megatron.conversion.layout import Layout

    baseline = memory_in_use()
    peak = baseline
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.005):
            peak = max(peak, memory_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if way == "to_megatron":
        convert.to_megatron(Path(source), Path(target), Layout())
    else:
        convert.to_huggingface(Path(source), Path(target))
    seconds = time.perf_counter() - start
    finished.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak - baseline}))


def memory_in_use() -> int:
    """Anonymous and shared resident bytes; pages of mapped files are the page cache's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024


if __name__ == "__main__":
    main()
