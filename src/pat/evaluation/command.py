"""`pat evaluate`: perplexity on a text, likelihood of responses, accuracy on tasks; of a checkpoint or an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from pat.checkpoint.adapter import base_name, load_adapted, read_adapter_config
from pat.errors import PatError
from pat.evaluation.tasks import TaskEvaluation, evaluate_tasks, load_questions
from pat.evaluation.tasks.protocols import PROTOCOLS, resolve_protocols
from pat.evaluation.tasks.report import score_table
from pat.evaluation.tasks.scores import SAMPLES, SCORES
from pat.loading import load_base, load_config, load_tokenizer
from pat.nll import NLL, Example, Progress, read_text, response_nll, text_perplexity
from pat.report.results import environment, write_results
from pat.training.data_record import DataRecord
from pat.training.prepare import prepare_examples
from pat.training.sources import TemplateChoice
from pat.training.vocabulary import Vocabulary
from pat.tuner.model import find_tuner

BATCH_SIZE = 8
"""Of text and responses; that of the tasks depends on the device, see `evaluate_tasks`."""

TOKENS_PER_LIMIT = 1000

RESULTS, COMMAND = "results.json", "evaluate"


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model."""

    model: str
    base_model: str | None
    """For an adapter, the base it was put on; None for a dense checkpoint."""
    mask: str | None
    """For an adapter: `hard` (0/1, as after the merge), or `soft at step ...`."""
    num_parameters: int
    dtype: str
    max_length: int
    text_file: str | None
    text: NLL | None
    """Over the tokens of the text."""
    dataset_name: str | None
    responses: NLL | None
    """Over the response tokens of the data."""
    num_rows: int
    """Rows of the data whose response was scored."""
    num_truncated: int
    """Rows that lose tokens of their response at `max_length`."""
    tasks: TaskEvaluation | None
    """Accuracy on tasks of choices."""


def evaluate(
    model: str,
    *,
    text_file: str | None = None,
    dataset_name: str | None = None,
    template: str = "auto",
    max_length: int = 512,
    limit: int | None = None,
    tasks: str | Sequence[str] | None = None,
    protocols: str | Sequence[str] = PROTOCOLS,
    data_dir: Path | None = None,
    batch_size: int | None = None,
    log_samples: bool = False,
    output_dir: Path | None = None,
    output: Path | None = None,
) -> Evaluation:
    """Measure a model on a text, on instruction data, on tasks, or on several of them.

    Args:
        model: folder or hub id of a dense checkpoint, or the folder of a PAT adapter (its base is found through it).
        text_file: plain text for token perplexity.
        dataset_name: instruction data, see `load_training_data`; all of it is scored.
        template: how instructions become prompts: "auto", "chat" or "alpaca".
        max_length: longest context, in tokens.
        limit: at most this many rows, thousand tokens of the text, and questions of each task, evenly spaced.
        tasks: names of tasks, or `paper` for its 14.
        protocols: how tasks are asked: `letter`, `likelihood` or both, see `pat.evaluation.tasks.protocols`.
        data_dir: folder with a `<task>.jsonl` for each task; without one the data comes from the hub.
        batch_size: rows of a forward pass.
        log_samples: keep the answer to every question of the tasks, in `output_dir`.
        output_dir: where finished tasks are kept, which are not repeated when started again, and `results.json`.
        output: JSON file to write as well.

    Raises:
        PatError: nothing to evaluate on, or model, text or data cannot be used.
    """
    _check(text_file, dataset_name, tasks, max_length, limit, batch_size, output)
    _check_task_options(tasks, data_dir, log_samples, output_dir)
    resolve_protocols(protocols)
    adapter = read_adapter_config(model) if is_adapter(model) else None
    name = model if adapter is None else base_name(model, adapter, None)
    config, _ = load_config(name)
    tokenizer = load_tokenizer(model if has_tokenizer(model) else name)
    # Read before the weights: a wrong column should not take minutes to be found.
    content = None if text_file is None else read_text(Path(text_file))
    vocabulary = Vocabulary(tokenizer, config.get_text_config().vocab_size)
    examples: Sequence[Example] = ()
    record: DataRecord | None = None
    if dataset_name is not None:
        choice = cast(TemplateChoice, template)
        examples, record = prepare_examples(
            dataset_name, vocabulary, template=choice, max_length=max_length, limit=limit
        )
    questions = None if tasks is None else load_questions(tasks, data_dir, limit)

    network: nn.Module = load_base(name) if adapter is None else load_adapted(model)
    network = network.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    text = responses = None
    if content is not None:
        with _progress("Text") as progress:
            text = text_perplexity(
                network,
                tokenizer,
                content,
                context=max_length,
                max_tokens=None if limit is None else limit * TOKENS_PER_LIMIT,
                batch_size=batch_size or BATCH_SIZE,
                progress=progress,
            )
    if examples:
        with _progress("Responses") as progress:
            pad_token_id = cast(int, tokenizer.pad_token_id)
            responses = response_nll(
                network, examples, batch_size=batch_size or BATCH_SIZE, pad_token_id=pad_token_id, progress=progress
            )
    accuracies = None
    if questions is not None:
        accuracies = evaluate_tasks(
            network,
            tokenizer,
            tasks=questions,
            protocols=protocols,
            limit=limit,
            batch_size=batch_size,
            log_samples=log_samples,
            output_dir=output_dir,
        )
    evaluation = Evaluation(
        model=model,
        base_model=None if adapter is None else name,
        mask=_describe_mask(network),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        dtype=str(next(network.parameters()).dtype).removeprefix("torch."),
        max_length=max_length,
        text_file=text_file,
        text=text,
        dataset_name=dataset_name,
        responses=responses,
        num_rows=len(examples),
        num_truncated=0 if record is None else record.num_truncated,
        tasks=accuracies,
    )
    files = [output] if output is not None else []
    for file in [*files, output_dir / RESULTS] if output_dir is not None else files:
        write_results(file, {"command": COMMAND, **environment(), **to_dict(evaluation)})
    return evaluation


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures ready for JSON, perplexities included."""
    facts = asdict(evaluation)
    for name in ("text", "responses"):
        nll: NLL | None = getattr(evaluation, name)
        if nll is not None:
            facts[name]["perplexity"] = nll.perplexity
    facts["tasks"] = None if evaluation.tasks is None else evaluation.tasks.to_dict()
    return facts


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures as tables on standard output."""
    console = Console(highlight=False, markup=False)
    kind = "" if evaluation.mask is None else f", PAT adapter on {evaluation.base_model}, mask {evaluation.mask}"
    console.print(f"{evaluation.model} ({evaluation.num_parameters:,} parameters, {evaluation.dtype}{kind})")
    table = Table()
    table.add_column("")
    for heading in ("tokens", "NLL", "perplexity"):
        table.add_column(heading, justify="right")
    for source, nll in ((evaluation.text_file, evaluation.text), (evaluation.dataset_name, evaluation.responses)):
        if nll is not None:
            table.add_row(source, f"{nll.num_tokens:,}", f"{nll.nll:.4f}", f"{nll.perplexity:,.2f}")
    if table.row_count:
        console.print(table)
    if evaluation.tasks is not None:
        console.print(score_table(evaluation.tasks))


def is_adapter(model: str) -> bool:
    """Tell whether a folder holds an adapter rather than a model."""
    return (Path(model).expanduser() / "adapter_config.json").is_file()


def has_tokenizer(model: str) -> bool:
    """Tell whether a folder holds a tokenizer; a hub id is no folder and does not count."""
    return (Path(model).expanduser() / "tokenizer_config.json").is_file()


def _check(
    text_file: str | None,
    dataset_name: str | None,
    tasks: str | Sequence[str] | None,
    max_length: int,
    limit: int | None,
    batch_size: int | None,
    output: Path | None,
) -> None:
    if text_file is None and dataset_name is None and tasks is None:
        raise PatError(
            "Got nothing to evaluate on; give --text_file (plain text), --dataset_name (instruction data) or --tasks."
        )
    for flag, value in (("max_length", max_length), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise PatError(f"Got {flag}={value}; expected a whole number above 0.")
    if output is not None and output.is_dir():
        raise PatError(f"Got output={output}, which is a folder; expected the name of a JSON file.")


def _check_task_options(
    tasks: str | Sequence[str] | None, data_dir: Path | None, log_samples: bool, output_dir: Path | None
) -> None:
    if tasks is None and (data_dir is not None or log_samples or output_dir is not None):
        raise PatError("Got --data_dir, --log_samples or --output_dir without --tasks; expected --tasks with them.")
    if log_samples and output_dir is None:
        raise PatError("Got --log_samples without --output_dir; expected a folder for the answers.")
    if output_dir is not None and output_dir.exists() and not output_dir.is_dir():
        raise PatError(f"Got output_dir={output_dir}, which is a file; expected a folder.")
    if output_dir is not None and output_dir.is_dir() and not _is_ours(output_dir):
        raise PatError(f"{output_dir}: holds files, but no evaluation; give an --output_dir of its own, or a new one.")


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds what an earlier evaluation, finished or not, has left."""
    path = folder / RESULTS
    if not path.exists():
        return any((folder / part).is_dir() for part in (SCORES, SAMPLES)) or not any(folder.iterdir())
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["command"] == COMMAND)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _describe_mask(network: nn.Module) -> str | None:
    tuner = find_tuner(network)
    if tuner is None:
        return None
    mask = tuner.mask()
    return "hard" if mask.hardened else f"soft at step {mask.step}"


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """Yield a progress function that draws a bar on stderr if a person is looking."""
    with tqdm(desc=what, unit="batch", disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield cast(Callable[[int, int], None], report)
