"""`oreal-data`: makes, checks and rates prompt files, and chooses what is trained on."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oreal_megatron.cli.arguments import add_overrides, add_subcommand, command_parser, positive
from oreal_megatron.cli.data_pass_rates import add_pass_rates
from oreal_megatron.cli.data_reports import add_output, progress_bar, share, show
from oreal_megatron.cli.data_selection import add_select, add_sft_from_rollouts
from oreal_megatron.cli.data_skills import add_skills
from oreal_megatron.cli.errors import run_command
from oreal_megatron.compose import composed, missing_value
from oreal_megatron.config import ConfigError, PromptConfig, Violation, parse_section
from oreal_megatron.data.curation.sources import find_files, num_records
from oreal_megatron.data.mapping import RecordMapping, load_mapping, presets, validated_mapping
from oreal_megatron.verifier.config import VerifierConfig


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-data`. Exit status 1: a file cannot be used, or `check` found faults and has no --output."""
    parser = command_parser(
        "oreal-data",
        "Makes prompt files (JSONL with question and gold_answer) from public data sets, checks and rates them, and\n"
        "chooses the prompts and responses that are trained on.",
        example="oreal-data import DAPO-Math-17k --output dapo.jsonl\n"
        "  oreal-data dedupe dapo.jsonl --output unique.jsonl\n"
        "  oreal-data decontaminate unique.jsonl --benchmark math500.jsonl aime24.jsonl --output train.jsonl\n"
        "  oreal-data check train.jsonl\n"
        "  oreal-data pass-rates models/Qwen2.5-7B train.jsonl --output rated.jsonl",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_import(commands)
    _add_check(commands)
    _add_dedupe(commands)
    _add_decontaminate(commands)
    add_pass_rates(commands)
    add_select(commands)
    add_sft_from_rollouts(commands)
    add_skills(commands)
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positional argument of a sub-command after an option.
    if rest and (not hasattr(arguments, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    run_command(lambda: arguments.run(arguments), continues=arguments.command == "pass-rates")


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listed = "\n".join(f"  {name:<18}{mapping.title}" for name, mapping in presets().items())
    command = add_subcommand(
        commands,
        "import",
        _import,
        "Writes a data set in the form that data.train reads.",
        "SOURCE is JSONL, a JSON array or object, a Parquet or Arrow file, or a directory: of `datasets`\n"
        "(save_to_disk), or a copy of a hub's repository. The preset that fits is found by the keys of the records.\n"
        f"Presets:\n{listed}",
        example="oreal-data import gsm8k/main --split train --output gsm8k.jsonl\n"
        "  oreal-data import own.parquet --field question=problem --field gold_answer=meta.answer --output own.jsonl",
    )
    command.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="files or directories of one data set")
    command.add_argument("--mapping", metavar="NAME|FILE", help="preset, or a YAML file (docs/data.md); default: found")
    command.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="KEY=EXPRESSION",
        help="place of question, gold_answer, response or pass_rate in a record, as a JMESPath expression; repeatable",
    )
    command.add_argument(
        "--final-answer",
        action="store_true",
        help="with --field: gold_answer is the text after #### or in the last box",
    )
    command.add_argument("--split", metavar="NAME", help="split of a directory with several (default: train)")
    add_output(command, required=True)


def _import(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation.importing import import_records, recognized

    files = [file for source in arguments.sources for file in find_files(source, arguments.split)]
    mapping = _mapping(arguments, lambda: recognized(files))
    with progress_bar("import", num_records(files)) as advance:
        report = import_records(files, arguments.output, mapping, advance=advance)
    show(report, arguments, title=f"{', '.join(map(str, arguments.sources))} as {mapping.title or 'given'}")
    return 0


def _mapping(arguments: argparse.Namespace, recognized: Callable[[], str]) -> RecordMapping:
    """Returns the mapping that --mapping or --field name, or else the preset that fits."""
    if arguments.mapping is not None and (arguments.field or arguments.final_answer):
        raise ValueError("--mapping and --field are both given. Put the fields into the mapping's file.")
    if arguments.mapping is not None:
        return load_mapping(arguments.mapping)
    if not arguments.field:
        if arguments.final_answer:
            raise ValueError("--final-answer is given without --field. Add --field gold_answer=KEY.")
        return presets()[recognized()]
    fields: dict[str, Any] = {}
    for option in arguments.field:
        key, equals, path = option.partition("=")
        if not equals:
            raise ValueError(f"--field {option}: KEY=EXPRESSION is expected, such as gold_answer=answer.")
        fields[key] = {"path": path, "final_answer": arguments.final_answer and key == "gold_answer"}
    return validated_mapping(fields, "--field")


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "check",
        _check,
        "Counts what is wrong with the lines of a prompt file.",
        "Gold answers that are empty, phrases or whole solutions, or that the verifier cannot read; repeated\n"
        "questions, with equal and with other gold answers; with overrides, prompts longer than\n"
        "prompt.max_prompt_tokens, in the chat template of model.tokenizer.\n"
        " Exit status 1: lines have faults, and no --output was given.",
        example="oreal-data check train.jsonl experiment=own_model model.path=models/qwen",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="JSONL file with question and gold_answer")
    add_overrides(command)
    add_output(command, required=False, help="file to write with the lines that have no fault of their own")


def _check(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation import checking

    num_tokens, limit = None, 0
    if arguments.overrides or arguments.config_dir is not None:
        num_tokens, limit = _prompt_lengths(arguments)
    with _verifier() as verifier, progress_bar("check", num_records([arguments.file])) as advance:
        report = checking.check(
            arguments.file,
            verifier,
            output=arguments.output,
            num_tokens=num_tokens,
            max_prompt_tokens=limit,
            advance=advance,
        )
    show(report, arguments, title=str(arguments.file))
    has_faults = any(kind not in (checking.SOUND, checking.REPEATED) for kind in report.counts)
    return 1 if has_faults and arguments.output is None else 0


def _prompt_lengths(arguments: argparse.Namespace) -> tuple[Callable[[str], int], int]:
    """Returns the function that counts the tokens of a question's prompt, and the limit of the configuration."""
    # Imported here because they import transformers, which --help should not wait for.
    from oreal_megatron.data.prompting import PromptRenderer
    from oreal_megatron.data.tokenizer import load_tokenizer

    config = composed(arguments.overrides, config_dir=arguments.config_dir)
    prompt = parse_section("prompt", OmegaConf.to_container(config.prompt, resolve=True), PromptConfig)
    try:
        tokenizer = load_tokenizer(str(config.model.tokenizer))
    except OmegaConfBaseException as error:
        violation = Violation("model.tokenizer", "???", missing_value("model.tokenizer"))
        raise ConfigError([violation]) from error
    renderer = PromptRenderer(tokenizer, prompt, vocab_size=max(tokenizer.get_vocab().values()) + 1)
    return lambda question: len(renderer.question_ids(question)), prompt.max_prompt_tokens


def _add_dedupe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "dedupe",
        _dedupe,
        "Writes the first line of each question.",
        "Questions are equal if they differ in case, punctuation and LaTeX's layout alone. Near duplicates have the\n"
        "same numbers, operators and gold answer, and almost the same words (MinHash of word triples). Questions with\n"
        "gold answers that differ in value are left out whole.",
        example="oreal-data dedupe dapo.jsonl --output unique.jsonl",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="JSONL file with question and gold_answer")
    command.add_argument(
        "--threshold",
        type=share,
        default=0.7,
        metavar="SHARE",
        help="Jaccard similarity of near duplicates; 1: equal questions only (default: %(default)s)",
    )
    add_output(command, required=True)


def _dedupe(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation.duplicates import dedupe

    threshold = None if arguments.threshold == 1 else arguments.threshold
    with _verifier() as verifier, progress_bar("dedupe", 2 * num_records([arguments.file])) as advance:
        report = dedupe(arguments.file, arguments.output, verifier, threshold=threshold, advance=advance)
    show(report, arguments, title=str(arguments.file))
    return 0


def _add_decontaminate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_subcommand(
        commands,
        "decontaminate",
        _decontaminate,
        "Leaves out the lines that have much of a benchmark's question.",
        "Overlap is the share of a benchmark question's words that are in n-grams of the training question.\n"
        "A match has all numbers of the benchmark's question as well. Some matches are shown; --matches writes all.",
        example="oreal-data decontaminate train.jsonl --benchmark math500.jsonl aime24.jsonl --output clean.jsonl",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="JSONL file with question and gold_answer")
    command.add_argument(
        "--benchmark", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files of benchmarks"
    )
    command.add_argument(
        "--overlap",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="least overlap of a match (default: %(default)s)",
    )
    command.add_argument(
        "--words", type=positive, default=5, metavar="N", help="words of an n-gram (default: %(default)s)"
    )
    command.add_argument("--matches", type=Path, metavar="FILE", help="JSONL file to write with every match")
    add_output(command, required=True)


def _decontaminate(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation.contamination import BenchmarkIndex, decontaminate

    with progress_bar("decontaminate", num_records([*arguments.benchmark, arguments.file])) as advance:
        report = decontaminate(
            arguments.file,
            arguments.output,
            BenchmarkIndex(arguments.benchmark, num_words=arguments.words, advance=advance),
            min_overlap=arguments.overlap,
            matches=arguments.matches,
            advance=advance,
        )
    show(report, arguments, title=str(arguments.file))
    return 0


@contextlib.contextmanager
def _verifier() -> Iterator[Any]:
    """Gives a verifier with the rules alone, and a process for each processor."""
    from oreal_megatron.verifier import build_verifier

    with build_verifier(VerifierConfig(num_workers=os.cpu_count() or 1)) as verifier:
        yield verifier


if __name__ == "__main__":
    main()
