"""The `pat` command: parse, call one function, print. What a command needs is imported when it is called.

Exit status: 0 done, 1 failed while running, 2 the user's input is wrong, 130 and 143 stopped by SIGINT and SIGTERM.
Errors are one line on stderr; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pat import __version__, ranks
from pat.errors import PatError
from pat.options import OptionsParser
from pat.report.progress import Phase, during, quiet_transformers


@dataclass(frozen=True)
class Command:
    """The parts of a command; they are named as `module:name`, so that nothing is imported yet."""

    summary: str
    options: str
    """Dataclass of its options."""
    run: str
    """Function of the options that does the work and returns a record of it."""
    show: str
    """Function of the record that prints it."""
    first: str = ""
    """Dataclass of those of its options that are looked at before the import of the others, which takes seconds."""
    flags: str = ""
    """Function that returns the names of all its flags without that import, or None where they cannot be had so."""


COMMANDS = {
    "tune": Command(
        "Data + base model -> tuned, smaller dense checkpoint (the main job).",
        options="pat.training.arguments:TuneArguments",
        run="pat.training.tune:run_tune",
        show="pat.training.outcome.summary:print_summary",
        first="pat.training.options:EarlyOptions",
        flags="pat.training.flag_names:flag_names",
    ),
    "plan": Command(
        "Sizes, legal widths, cost and memory of a pruned model, from its configuration alone.",
        options="pat.plan.options:PlanOptions",
        run="pat.plan.command:run_plan",
        show="pat.plan.tables:print_plan",
    ),
    "report": Command(
        "A run of `pat tune` as one page of HTML: figures, drawings, what was cut, how to load it.",
        options="pat.training.outcome.options:ReportOptions",
        run="pat.training.outcome.report:run_report",
        show="pat.training.outcome.report:print_report",
    ),
    "merge": Command(
        "PAT adapter -> dense checkpoint, streamed and verified.",
        options="pat.checkpoint.options:MergeOptions",
        run="pat.checkpoint.merge:run_merge",
        show="pat.checkpoint.merge:print_merge",
    ),
    "convert": Command(
        "Adapter of the paper's published code -> dense checkpoint, verified.",
        options="pat.formats.options:ConvertOptions",
        run="pat.formats.convert:run_convert",
        show="pat.formats.convert:print_convert",
    ),
    "evaluate": Command(
        "Accuracy on the paper's 14 tasks, perplexity on a text file, held-out likelihood of responses.",
        options="pat.evaluation.options:EvaluateOptions",
        run="pat.evaluation.command:run_evaluate",
        show="pat.evaluation.command:print_evaluation",
    ),
    "benchmark": Command(
        "Speed and memory of a model beside its base, measured in turns and predicted.",
        options="pat.benchmark.options:BenchmarkOptions",
        run="pat.benchmark.command:run_benchmark",
        show="pat.benchmark.tables:print_benchmark",
    ),
    "export": Command(
        "A model as a file of another engine (GGUF, ONNX, OpenVINO), checked by running it there.",
        options="pat.formats.options:ExportOptions",
        run="pat.formats.command:run_export",
        show="pat.formats.command:print_export",
    ),
    "demo": Command(
        "The main job on a model and data from the package index; no hub needed.",
        options="pat.demo.options:DemoOptions",
        run="pat.demo.command:run_demo",
        show="pat.demo.command:print_demo",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments, debug = _without_debug(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"pat {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    try:
        return _run(arguments[0], arguments[1:])
    except BrokenPipeError:  # nobody reads on, as in `pat tune --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except KeyboardInterrupt as error:
        if debug:
            raise
        known = str(error) or "the same command goes on from what is finished"
        goes_on = f"; {known}" if arguments[0] == "tune" else ""
        print(f"pat: interrupted{goes_on}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        if ranks.speaks(error):
            print(f"pat: {_describe(error)}", file=sys.stderr, flush=True)
        return error.exit_status if isinstance(error, PatError) else 1


def _run(name: str, argv: Sequence[str]) -> int:
    if name == "launch":
        return int(_load("pat.launch:launch")(argv))
    if ranks.num_processes() > 1 and name != "tune":
        raise PatError(
            f"Got {ranks.num_processes()} processes for `pat {name}`, which runs in one; start it by itself."
        )
    if name not in COMMANDS:
        known = [*COMMANDS, "launch"]
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {near[0]}? E" if near else "e"
        raise PatError(f"Got the command {name!r}; {guess}xpected one of {', '.join(known)} (see `pat --help`).")
    command = COMMANDS[name]
    try:
        with warnings.catch_warnings():
            # What the libraries will change in their next versions is nothing a person at the terminal can act on.
            warnings.simplefilter("ignore", FutureWarning)
            if command.first and not {"-h", "--help"} & set(argv):
                first: OptionsParser[Any] = OptionsParser(f"pat {name}", _load(command.first))
                first.check(first.read(argv, others=_load(command.flags)()))
            with _loading():
                declared = _load(command.options)
            options = OptionsParser(f"pat {name}", declared, command.summary).parse(argv)
            with _loading():  # only now: the options of most commands are checked without torch
                run = _load(command.run)
            with quiet_transformers():
                record = run(options)
            if not ranks.is_first():
                pass  # the first process shows what they came to together
            elif getattr(options, "json", False):  # a command that has the flag
                print(_load("pat.report.records:to_json")(record), end="")
            else:
                _load(command.show)(record)
    except SystemExit as leave:  # argparse's way to end after --help
        if leave.code:
            raise
    sys.stdout.flush()
    return 0


def _loading() -> AbstractContextManager[None]:
    return during(Phase("Loading PyTorch and transformers"), shown=ranks.is_first())


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    gc.disable()  # what an import makes stays; walking it again and again takes a fifth of the seconds
    try:
        return getattr(import_module(module), attribute)
    finally:
        gc.enable()


def _without_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out where it stands alone; with a value it is TrainingArguments' own."""
    following = [*argv[1:], "-"]
    alone = [
        index
        for index, argument in enumerate(argv)
        if argument == "--debug" and (index == 0 or following[index].startswith("-"))
    ]
    return [argument for index, argument in enumerate(argv) if index not in alone], bool(alone)


def _describe(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, PatError):
        return message
    if ranks.lost(error):
        return f"another process of this run has ended ({message[:100]}); see its message, then give the command again."
    return f"{type(error).__name__}: {message or 'no message'} (run again with --debug for the traceback)"


def _overview() -> str:
    lines = [f"pat {__version__}: fine-tune a language model and get it back smaller", ""]
    lines += ["usage: pat COMMAND --flags", ""]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    lines += [f"  {'launch':<10}`tune` in several processes, by a call of accelerate."]
    return "\n".join([*lines, "", "`pat COMMAND --help` lists a command's flags; `--debug` shows tracebacks."])


if __name__ == "__main__":
    sys.exit(main())
