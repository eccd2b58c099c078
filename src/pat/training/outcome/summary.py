"""The table a person sees at the end of a run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from shlex import quote

import torch
from transformers.utils import CONFIG_NAME

from pat.checkpoint.places import HELD_OUT, REPORT, RESULTS
from pat.data.tokens import Truncation
from pat.report import numbers
from pat.report.table import Table
from pat.report.usage import command_to_ask
from pat.serving import verdicts
from pat.training.outcome.measure import has_forgotten_much
from pat.training.outcome.results import ModelFigures, TuneResult

STAGES = {"base": "base", "tuned": "tuned, with its adapter", "dense": "dense, written"}

_TYPE = "Q8_0"
"""Type of the file whose export is named: half the size of 16 bits, and `pat export` writes it by itself."""

_WRITES, _CHECKS = "gguf", "xllamacpp"
"""Packages of the extra `gguf`: one writes the file, which needs it, and the other runs it to check it."""

_UNCUT = 10**9
"""Length to measure at after a run that cuts no row: longer than any."""


def print_summary(result: TuneResult) -> None:
    """Print base, tuned and dense model side by side, the parity, and where everything is."""
    if result.was_finished:
        print(
            f"{result.output_dir}: this run is finished, after {result.record.num_steps:,} steps; the model is in "
            f"{result.model_dir}, and --overwrite true starts anew."
        )
        print(f"To ask it: {how_to_ask(result)}")
        return
    tokens = f"{result.figures['dense'].num_held_out_tokens:,}"
    Table(
        title=f"Base, tuned and written model (held-out NLL: nats per token over {tokens} tokens, ± standard error)",
        columns=("", "parameters", "size", "held-out NLL"),
        rows=[(name, *_cells(result.figures[stage])) for stage, name in STAGES.items()],
    ).print()
    base, dense = result.figures["base"], result.figures["dense"]
    for line in against_base(base, dense):
        print(line)
    fewer = f"{1 - dense.num_parameters / base.num_parameters:.1%} fewer parameters"
    if base.flops_per_token and dense.flops_per_token:
        fewer += f", {1 - dense.flops_per_token / base.flops_per_token:.1%} fewer FLOPs to read a token"
    print(f"{fewer}. {result.parity.describe()}")
    print(f"Model: {result.model_dir}\nAdapter: {result.adapter_dir}\nFigures: {result.output_dir / RESULTS}")
    if (result.output_dir / REPORT).is_file():
        print(f"Report: {result.output_dir / REPORT}")
    print(f"To ask it: {how_to_ask(result)}")
    if (following := next_step(result)) is not None:
        print(following)
    for line in how_to_measure(result):
        print(line)


def against_base(base: ModelFigures, dense: ModelFigures) -> list[str]:
    """Return lines on how the written model's losses differ from its base's, and whether that can be told at all."""
    lines = []
    error = dense.held_out_difference_error
    if base.held_out_nll is not None and dense.held_out_nll is not None and error is not None:
        distance = dense.held_out_nll - base.held_out_nll
        lines.append(
            f"Held-out NLL, written model against base: {numbers.difference(distance, error)} (± standard error of the "
            f"difference){'' if numbers.is_told_apart(distance, error) else '; the two are not told apart'}."
        )
    if base.general_nll is not None:
        by = ends = ""
        if dense.general_nll is not None:
            distance, error = dense.general_nll - base.general_nll, dense.general_difference_error
            by = f"; {numbers.difference(distance, error)}"
            if has_forgotten_much(base, dense):
                ends = ": the model has forgotten much of what its base knew"
            elif error is not None and not numbers.is_told_apart(distance, error):
                ends = "; the two are not told apart"
        lines.append(
            f"General text, which shows what was forgotten: {numbers.loss(base.general_nll)} before, "
            f"{numbers.loss(dense.general_nll, dense.general_standard_error)} now (nats per token over "
            f"{base.num_general_tokens:,} tokens{by}){ends}."
        )
    return lines


def how_to_ask(result: TuneResult) -> str:
    """Return a command that asks the written model in the form of its training, or where the Python for that stands."""
    number = result.record.machine.num_threads
    # Fewer than torch takes by itself, as a run that measures it does where cores are busy or few.
    fewer = number if result.record.device == "cpu" and number < torch.get_num_threads() else None
    known = command_to_ask(result.record.prompt_format, str(result.model_dir), fewer)
    return known or f"the Python in {result.model_dir / 'README.md'}"


def how_to_measure(result: TuneResult) -> list[str]:
    """Return lines with the commands that measure the written model on the held-out rows as the run has measured it.

    There is one for each file of them, and none where there is no file. Where the run scores what `pat evaluate` cannot
    be told to score, a line says that instead.
    """
    files = [file for name in HELD_OUT if (file := result.output_dir / name).is_file()]
    record, given = result.record, result.record.training_arguments
    length = given.get("max_length")
    cut = Truncation(
        max_length=length if isinstance(length, int) else None,
        truncation_mode=str(given.get("truncation_mode")),
        packing=given.get("packing") is True,
        packing_strategy=str(given.get("packing_strategy")),
    )
    learns_prompts = given.get("completion_only_loss") is False and any(
        part.format != "text" for part in record.data.sources or (record.data,)
    )
    if files and (learns_prompts or cut.keeps_end or cut.room != cut.max_length):
        names = ", ".join(str(file) for file in files)
        return [f"Held-out rows: {names}; this run scores other tokens of them than `pat evaluate` does."]
    tokens = ", in tokens of the model's own" if record.cut.trims_vocabulary else ""
    return [
        f"On the held-out rows{tokens}: pat evaluate --model {quote(str(result.model_dir))} "
        f"--dataset_name {quote(str(file))} --max_length {cut.max_length or _UNCUT}"
        for file in files
    ]


def next_step(result: TuneResult) -> str | None:
    """Return a line with the command that makes a file for llama.cpp of the model; None where there is none."""
    try:
        model_type = json.loads((result.model_dir / CONFIG_NAME).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # moved away meanwhile
        return None
    is_written = _TYPE in (result.figures["dense"].gguf_bytes or {})
    if not is_written or verdicts(model_type, result.record.cut.axes)["llama.cpp"].verdict != "runs":
        return None
    file = f"{result.output_dir.resolve().name or 'small'}.gguf"
    command = (
        f"pat export --model {quote(str(result.model_dir))} --format gguf --quantize {_TYPE} --output {quote(file)}"
    )
    return f"For llama.cpp, Ollama or LM Studio: {command}{_to_install()}"


def _to_install() -> str:
    """Say which packages are missing for the file and its check."""
    missing = [name for name in (_WRITES, _CHECKS) if not find_spec(name)]
    if not missing:
        return ""
    why = "" if _WRITES in missing else ", which checks the file"
    return f" (first: pip install 'pat-llm[gguf]'{why})"


def _cells(figures: ModelFigures) -> tuple[str, ...]:
    return (
        numbers.count(figures.num_parameters),
        numbers.size(figures.num_bytes),
        numbers.loss(figures.held_out_nll, figures.held_out_standard_error),
    )
