"""The `pat` command: parse, call one function each, print. Heavy imports stay inside the commands.

Exit status: 0 done, 1 failed while running, 2 the user's input is wrong. Errors are one line on stderr; `--debug`
shows the traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from pat import __version__
from pat.command_parser import CommandParser
from pat.errors import PatError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
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
    except KeyboardInterrupt:
        if debug:
            raise
        print("pat: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"pat: {_one_line(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, PatError) else 1


def _run(name: str, argv: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise PatError(f"Got the command {name!r}; expected one of {', '.join(COMMANDS)} (see `pat --help`).")
    try:
        with warnings.catch_warnings():
            # What the libraries will change in their next versions is nothing a person at the terminal can act on.
            warnings.simplefilter("ignore", FutureWarning)
            COMMANDS[name](argv)
    except SystemExit as leave:  # argparse's way to end after --help
        if leave.code:
            raise
    sys.stdout.flush()
    return 0


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, PatError):
        return message
    return f"{type(error).__name__}: {message or 'no message'} (run again with --debug for the traceback)"


def _tune(argv: Sequence[str]) -> None:
    """Data + base model -> tuned, smaller dense checkpoint (the main job)."""
    from pat.training.arguments import parse_arguments
    from pat.training.summary import print_summary
    from pat.training.tune import run_tune

    print_summary(run_tune(parse_arguments(argv)))


def _merge(argv: Sequence[str]) -> None:
    """PAT adapter -> dense checkpoint, streamed and verified."""
    parser = CommandParser("merge", _merge)
    parser.add_argument("--adapter", required=True, help="Folder of a PAT adapter.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Where the dense checkpoint goes; empty or new.")
    parser.add_argument("--base_model", help="Base model, if it has moved since the adapter was trained.")
    parser.add_argument("--dtype", help="Of the written weights, such as bfloat16; by default the base's.")
    parser.add_argument("--text_file", help="Text to compare masked and dense model on; by default a built-in one.")
    parser.add_argument("--max_shard_size", help="Largest weight file, such as 5GB; by default as large as the base's.")
    parser.add_argument(
        "--fold_dtype", help="To fold in: float64 or float32; by default float32 for weights of 16 bits, else float64."
    )
    parser.add_argument("--device", default="cpu", help="Where to compute, such as cuda.")
    options = parser.parse(argv)

    from pat.checkpoint.merge import merge

    result = merge(
        options.adapter,
        options.output_dir,
        base_model=options.base_model,
        dtype=options.dtype,
        text_file=options.text_file,
        max_shard_size=options.max_shard_size,
        fold_dtype=options.fold_dtype,
        device=options.device,
    )
    print(f"Wrote {result.model_dir} ({result.num_parameters:,} parameters); {result.parity.describe()}")


def _plan(argv: Sequence[str]) -> None:
    """Sizes, legal widths, cost and memory of a pruned model, from its configuration alone."""
    parser = CommandParser("plan", _plan)
    parser.add_argument(
        "--model_name_or_path", required=True, help="Base model folder or hub id; only its config is read."
    )
    parser.add_argument("--pruning_ratio", type=float, help="Share of the hidden size to cut (default 0.25).")
    parser.add_argument("--pruned_hidden_size", type=int, help="Exact hidden size instead of a ratio.")
    parser.add_argument("--multiple_of", type=int, help="Hard alignment of the pruned hidden size.")
    parser.add_argument("--untie_word_embeddings", action="store_true", help="Give a tied model its own output matrix.")
    parser.add_argument(
        "--context", type=int, help="Tokens that costs are for (default 2048, or all the model can read)."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    options = parser.parse(argv)

    from pat.plan import make_plan, print_plan

    print_plan(
        make_plan(
            options.model_name_or_path,
            pruning_ratio=options.pruning_ratio,
            pruned_hidden_size=options.pruned_hidden_size,
            multiple_of=options.multiple_of,
            untie_word_embeddings=options.untie_word_embeddings,
            context=options.context,
        ),
        as_json=options.json,
    )


def _evaluate(argv: Sequence[str]) -> None:
    """Accuracy on the paper's 14 tasks, perplexity on a text file, held-out likelihood of responses."""
    parser = CommandParser("evaluate", _evaluate)
    parser.add_argument("--model", required=True, help="Model folder or hub id, or the folder of a PAT adapter.")
    parser.add_argument("--text_file", type=Path, help="Plain text: token perplexity over sliding windows.")
    parser.add_argument("--dataset_name", help="Instruction data: mean NLL of its responses.")
    parser.add_argument("--template", help="Prompt template of instruction data (auto, chat, alpaca).")
    parser.add_argument("--max_length", type=int, help="Context in tokens (default 512).")
    parser.add_argument(
        "--limit",
        type=int,
        help="At most this many rows, thousand tokens of text, or questions of each task (evenly spaced).",
    )
    parser.add_argument("--tasks", nargs="+", help="Accuracy on tasks: their names, or 'paper' for its 14.")
    parser.add_argument("--data_dir", type=Path, help="Folder with a <task>.jsonl for each; by default from the hub.")
    parser.add_argument("--protocol", nargs="+", help="How tasks are asked: letter or likelihood; by default both.")
    parser.add_argument("--batch_size", type=int, help="Rows of a forward pass.")
    parser.add_argument("--log_samples", action="store_true", help="Keep the answer to every question of the tasks.")
    parser.add_argument("--output_dir", type=Path, help="Keep answers to tasks here; started again, none is repeated.")
    parser.add_argument("--output", type=Path, help="Also write the figures to this JSON file.")
    given = {name: value for name, value in vars(parser.parse(argv)).items() if value is not None}

    from pat.evaluation.options import EvaluateOptions

    options = EvaluateOptions(**given)

    from pat.evaluation.command import print_evaluation, run_evaluate

    print_evaluation(run_evaluate(options))


def _benchmark(argv: Sequence[str]) -> None:
    """Speed and memory of a model beside its base, measured in turns and predicted."""
    parser = CommandParser("benchmark", _benchmark)
    parser.add_argument("--model", required=True, help="Folder or hub id of the smaller model.")
    parser.add_argument("--baseline", required=True, help="Folder or hub id of the model it is compared with.")
    parser.add_argument("--contexts", nargs="+", help="Tokens of each sequence (default 128 512 2048).")
    parser.add_argument("--batch_sizes", nargs="+", help="Sequences in a batch (default 1 8 16).")
    parser.add_argument("--new_tokens", type=int, help="Tokens to generate for each sequence (default 32); 0 for none.")
    parser.add_argument("--repetitions", type=int, help="Measurements of each model at each setting (default 5).")
    parser.add_argument("--warmup", type=int, help="Runs at each setting before those that count (default 1).")
    parser.add_argument(
        "--max_seconds", type=float, help="Begin no repetition of a setting after as many seconds, once 3 are measured."
    )
    parser.add_argument("--dtype", help="Of both models, such as float32; by default the one each is stored in.")
    parser.add_argument("--device", help="cpu, or an accelerator such as cuda:0; by default one that is there.")
    parser.add_argument("--threads", type=int, help="CPU threads of each model; by default torch's choice.")
    parser.add_argument("--output_dir", type=Path, help="Where JSON, table and figure go; empty or new.")
    options = vars(parser.parse(argv))

    from pat.benchmark import BenchmarkOptions, print_benchmark, run_benchmark
    from pat.benchmark.options import parse_counts

    given = {name: value for name, value in options.items() if value is not None}
    for name in ("contexts", "batch_sizes"):
        if name in given:
            given[name] = parse_counts(",".join(given[name]), name)
    print_benchmark(run_benchmark(BenchmarkOptions(**given)))


def _demo(argv: Sequence[str]) -> None:
    """The main job on a model and data from the package index; no hub needed."""
    parser = CommandParser("demo", _demo)
    parser.add_argument("--output_dir", type=Path, default=Path("pat-demo"), help="Where the run goes; empty or new.")
    parser.add_argument(
        "--dataset_name", help="Instruction data; by default the small set that comes with the package."
    )
    parser.add_argument("--cache_dir", type=Path, help="Where the downloaded base model is kept.")
    parser.add_argument("--pruning_ratio", type=float, help="Share of the hidden size to cut.")
    parser.add_argument("--max_steps", type=int, help="Optimizer steps; more give a better model.")
    options = parser.parse(argv)

    from pat.demo.command import run_demo

    run_demo(
        options.output_dir,
        dataset_name=options.dataset_name,
        cache_dir=options.cache_dir,
        pruning_ratio=options.pruning_ratio,
        max_steps=options.max_steps,
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "tune": _tune,
    "plan": _plan,
    "merge": _merge,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "demo": _demo,
}


def _overview() -> str:
    lines = [
        f"pat {__version__}: fine-tune a language model and get it back smaller",
        "",
        "usage: pat COMMAND --flags",
        "",
    ]
    lines += [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`pat COMMAND --help` lists a command's flags; `--debug` shows tracebacks."])


if __name__ == "__main__":
    sys.exit(main())
