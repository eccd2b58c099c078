"""The `pat` command: parse, call one function each, print. Heavy imports stay inside the commands.

Exit status: 0 done, 1 failed while running, 2 the user's input is wrong. Errors are one line on stderr; `--debug`
shows the traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pat import __version__
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
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise PatError(f"Got the command {name!r}; expected one of {', '.join(COMMANDS)}.")
        COMMANDS[name](rest)
    except PatError as error:
        if debug:
            raise
        print(f"pat: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("pat: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        detail = " ".join(str(error).split()) or "no message"
        print(f"pat: {type(error).__name__}: {detail} (run again with --debug for the traceback)", file=sys.stderr)
        return 1
    return 0


def _tune(argv: Sequence[str]) -> None:
    """Data + base model -> tuned, smaller dense checkpoint (the main job)."""
    from pat.training.arguments import parse_arguments
    from pat.training.summary import print_summary
    from pat.training.tune import run_tune

    print_summary(run_tune(parse_arguments(argv)))


def _merge(argv: Sequence[str]) -> None:
    """PAT adapter -> dense checkpoint, verified."""
    parser = _Parser("merge", _merge)
    parser.add_argument("--adapter", required=True, help="Folder of a PAT adapter.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Where the dense checkpoint goes; empty or new.")
    parser.add_argument("--base_model", help="Base model, if it has moved since the adapter was trained.")
    parser.add_argument("--dtype", help="Of the written weights, such as bfloat16; by default the base's.")
    parser.add_argument("--text_file", help="Text to compare masked and dense model on; by default a built-in one.")
    options = parser.parse(argv)

    from pat.export.merge import merge

    result = merge(
        options.adapter,
        options.output_dir,
        base_model=options.base_model,
        dtype=options.dtype,
        text_file=options.text_file,
    )
    print(f"Wrote {result.model_dir} ({result.num_parameters:,} parameters); {result.parity.describe()}")


def _plan(argv: Sequence[str]) -> None:
    """Sizes, legal widths, cost and memory of a pruned model, from its configuration alone."""
    parser = _Parser("plan", _plan)
    parser.add_argument(
        "--model_name_or_path", required=True, help="Base model folder or hub id; only its config is read."
    )
    parser.add_argument("--pruning_ratio", type=float, help="Share of the hidden size to cut (default 0.25).")
    parser.add_argument("--pruned_hidden_size", type=int, help="Exact hidden size instead of a ratio.")
    parser.add_argument("--multiple_of", type=int, help="Hard alignment of the pruned hidden size.")
    parser.add_argument("--untie_word_embeddings", action="store_true", help="Give a tied model its own output matrix.")
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
        ),
        as_json=options.json,
    )


def _evaluate(argv: Sequence[str]) -> None:
    """Perplexity on a text file, and held-out likelihood of responses."""
    parser = _Parser("evaluate", _evaluate)
    parser.add_argument("--model", required=True, help="Model folder or hub id, or the folder of a PAT adapter.")
    parser.add_argument("--text_file", help="Plain text: token perplexity over sliding windows.")
    parser.add_argument("--dataset_name", help="Instruction data: mean NLL of its responses.")
    parser.add_argument("--template", default="auto", help="Prompt template of instruction data (auto, chat, alpaca).")
    parser.add_argument("--max_length", type=int, default=512, help="Context in tokens.")
    parser.add_argument("--limit", type=int, help="At most this many rows, or thousand tokens of text.")
    parser.add_argument("--output", type=Path, help="Also write the figures to this JSON file.")
    options = parser.parse(argv)

    from pat.evaluation.command import evaluate, print_evaluation

    print_evaluation(
        evaluate(
            options.model,
            text_file=options.text_file,
            dataset_name=options.dataset_name,
            template=options.template,
            max_length=options.max_length,
            limit=options.limit,
            output=options.output,
        )
    )


def _demo(argv: Sequence[str]) -> None:
    """The main job on a model and data from the package index; no hub needed."""
    parser = _Parser("demo", _demo)
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
    "demo": _demo,
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `PatError`s, and that takes its description from the command's docstring."""

    def __init__(self, name: str, command: Callable[[Sequence[str]], None]) -> None:
        super().__init__(prog=f"pat {name}", description=command.__doc__, allow_abbrev=False)

    def error(self, message: str):  # type: ignore[no-untyped-def]  # argparse types this as NoReturn
        """Raise what argparse would print."""
        raise PatError(f"{message}; see `{self.prog} --help`.")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse with the defaults of a `--config` YAML file, if one is named, below the flags."""
        self.add_argument("--config", type=Path, help="YAML file of defaults for these flags.")
        known, _ = argparse.ArgumentParser.parse_known_args(_ConfigOnly(), list(argv))
        if known.config is not None:
            self.set_defaults(**_read_config(known.config, {action.dest for action in self._actions}))
            for action in self._actions:
                action.required = action.required and self.get_default(action.dest) is None
        return self.parse_args(list(argv))


class _ConfigOnly(argparse.ArgumentParser):
    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config", type=Path)


def _read_config(path: Path, known: set[str]) -> dict[str, object]:
    import yaml

    if not path.is_file():
        raise PatError(f"Got --config {path}, but there is no such file; expected a YAML file of flags.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise PatError(f"Got --config {path}, which is no YAML mapping; expected lines such as `pruning_ratio: 0.25`.")
    unknown = sorted(set(content) - known)
    if unknown:
        raise PatError(f"Got the unknown flag(s) {', '.join(unknown)} in {path}; remove them.")
    return content


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
