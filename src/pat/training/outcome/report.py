"""`pat report`: the page that shows a run of `pat tune`, made anew of what lies in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pat.checkpoint.places import REPORT
from pat.errors import PatError, one_line
from pat.recipes import RECIPES
from pat.report.page import Changed, render_report
from pat.report.records import Record, plain
from pat.shape import DEFAULT_PRUNING_RATIO
from pat.training.arguments import build_arguments
from pat.training.outcome.options import ReportOptions, read_record
from pat.training.run.run_file import RunFile
from pat.whole_files import write_whole

logger = logging.getLogger(__name__)


_NOT_SHOWN = {
    *("model_name_or_path", "dataset_name", "output_dir", "logging_dir", "run_name", "recipe", "hub_token", "seed"),
    *("disable_tqdm", "report_to", "resume_from_checkpoint", "push_to_hub", "keep_checkpoints"),
    *("dtype", "use_cpu", "bf16", "gradient_checkpointing", "logging_steps", "save_total_limit"),
}
"""Options that the report names elsewhere, that change nothing in the model, or whose defaults are the machine's."""

_UNSET = {"pruning_ratio": f"{DEFAULT_PRUNING_RATIO:g}"}
"""Values that the report shows for options that are not set; for all others it says so in words."""


@dataclass(frozen=True, kw_only=True)
class ReportRecord(Record):
    """The report that was written."""

    command: Literal["report"] = "report"
    run: Path
    report: Path
    num_bytes: int


def run_report(options: ReportOptions) -> ReportRecord:
    """Write the report of a run from its `results.json` and `run.json`, whole or not at all.

    Raises:
        PatError: there is no record of `pat tune` in the folder, or the file cannot be written.
    """
    report = options.output or options.run / REPORT
    content = render_report(record := read_record(options.run), changed_options(options.run, record))
    # A text from JSON may hold half of a surrogate pair, which no file can.
    encoded = content.encode("utf-8", "replace")
    try:
        write_whole(report, encoded.decode("utf-8"))
    except OSError as error:
        raise PatError(f"{report}: cannot be written ({error.strerror}); choose another file.") from error
    return ReportRecord(run=options.run, report=report, num_bytes=len(encoded))


def print_report(record: ReportRecord) -> None:
    """Print where the report is."""
    print(f"Report: {record.report}")


def report_of_run(folder: Path) -> None:
    """Write the report of a run that has just ended. What goes wrong is a warning: the model is there, and complete."""
    try:
        run_report(ReportOptions(run=folder))
    except Exception as error:  # whatever an odd record makes a template or a number raise
        logger.warning(
            "The report was not written (%s: %s); `pat report --run %s` does it anew.",
            type(error).__name__,
            one_line(error),
            folder,
        )


def changed_options(folder: Path, record: Mapping[str, Any]) -> list[Changed] | None:
    """Return the options of a run that are not its recipe's defaults; None where they cannot be known.

    Most stand in `run.json`, and the rest, how long and how much at once, among the trainer's arguments in the record.
    """
    recipe, training_arguments = record.get("recipe"), record.get("training_arguments")
    try:
        run = RunFile.read(folder)
    except PatError:
        run = None
    if recipe not in RECIPES or run is None or not isinstance(training_arguments, Mapping):
        return None
    return sorted(_differing(str(recipe), {**training_arguments, **run.configuration}), key=lambda row: row.name)


def _differing(recipe: str, given: Mapping[str, Any]) -> Iterator[Changed]:
    defaults = build_arguments(
        model_name_or_path="base", dataset_name="data", output_dir="out", recipe=recipe, bf16=False
    )
    for part in (defaults.run, defaults.model, defaults.sft, defaults.pat, defaults.distill):
        for option in fields(part):
            # Sets and enumerations are written as JSON has them, and the trainer's arguments as text.
            value = getattr(part, option.name)
            default = plain(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)
            if isinstance(default, dict):
                default.pop("use_configured_state", None)  # which the trainer takes out of its `accelerator_config`
            if option.name not in given or option.name in _NOT_SHOWN:
                continue
            unset, found = _UNSET.get(option.name, "not set"), given[option.name]
            # Whoever gives what a default comes to has changed nothing.
            before, after = (unset if value in (None, "None") else str(value) for value in (default, found))
            if found != default and before != after:
                yield Changed(option.name, before, after)
