"""`pat evaluate`: perplexity on a text, likelihood of responses, accuracy on tasks; of a checkpoint or an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pat.checkpoint.adapter import base_name, load_adapted, read_adapter_config
from pat.errors import PatError
from pat.evaluation.harness import TaskScores, evaluate_tasks, load_tasks
from pat.evaluation.options import COMMAND, RESULTS, EvaluateOptions
from pat.loading import load_base, load_config, load_tokenizer
from pat.nll import NLL, Progress, read_text, response_nll, text_perplexity, tokenize_examples
from pat.report.results import environment, write_results
from pat.training.data import check_truncation, load_training_data
from pat.training.sources import TemplateChoice
from pat.tuner.model import find_tuner

TOKENS_PER_LIMIT = 1000


@dataclass(frozen=True)
class EvaluationRecord:
    """Figures of one model."""

    model: str
    base_model: str | None
    """Base that an adapter was put on; None for a dense checkpoint."""
    mask: str | None
    """State of an adapter's mask: `hard` (0/1, as after the merge), or `soft at step ...`."""
    num_parameters: int
    dtype: str
    max_length: int
    text_file: str | None
    text: NLL | None
    """Figures over the tokens of the text."""
    dataset_name: str | None
    responses: NLL | None
    """Figures over the response tokens of the data."""
    num_rows: int
    """Number of rows of the data whose response was scored."""
    num_truncated: int
    """Number of rows left out because nothing of their response fits into `max_length`."""
    tasks: TaskScores | None
    """Accuracy on tasks."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON, perplexities included."""
        facts = asdict(self)
        for name in ("text", "responses"):
            nll: NLL | None = getattr(self, name)
            if nll is not None:
                facts[name]["perplexity"] = nll.perplexity
        facts["tasks"] = None if self.tasks is None else self.tasks.to_dict()
        return {"command": COMMAND, **environment(), **facts}


def run_evaluate(options: EvaluateOptions) -> EvaluationRecord:
    """Measure a model on a text, on instruction data, on tasks, or on several of them.

    Raises:
        PatError: model, text, data or questions cannot be used.
    """
    # Everything is read before the weights: a wrong column should not take minutes to be found.
    adapter = read_adapter_config(options.model) if _is_adapter(options.model) else None
    name = options.model if adapter is None else base_name(options.model, adapter, None)
    load_config(name)
    tokenizer = load_tokenizer(options.model if adapter is None or _has_tokenizer(options.model) else name)
    content = None if options.text_file is None else read_text(options.text_file)
    examples, num_truncated = _examples(options, tokenizer)
    tasks = None if options.tasks is None else load_tasks(options.tasks, options.protocol, options.data_dir)

    network: nn.Module = load_base(name) if adapter is None else load_adapted(options.model)
    network = network.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    _check_tokens(tokenizer, network, content, tasks or {})
    text = responses = scores = None
    if content is not None:
        max_tokens = None if options.limit is None else options.limit * TOKENS_PER_LIMIT
        with _progress("Text") as progress:
            text = text_perplexity(
                network,
                tokenizer,
                content,
                context=options.max_length,
                max_tokens=max_tokens,
                batch_size=options.batch_size,
                progress=progress,
            )
    if examples:
        pad = cast(int, tokenizer.pad_token_id)
        with _progress("Responses") as progress:
            responses = response_nll(
                network, examples, batch_size=options.batch_size, pad_token_id=pad, progress=progress
            )
    if tasks is not None:
        scores = evaluate_tasks(
            network,
            tokenizer,
            tasks=tasks,
            limit=options.limit,
            batch_size=options.batch_size,
            output_dir=options.output_dir,
            log_samples=options.log_samples,
        )
    record = EvaluationRecord(
        model=options.model,
        base_model=None if adapter is None else name,
        mask=_describe_mask(network),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        dtype=str(next(network.parameters()).dtype).removeprefix("torch."),
        max_length=options.max_length,
        text_file=None if options.text_file is None else str(options.text_file),
        text=text,
        dataset_name=options.dataset_name,
        responses=responses,
        num_rows=len(examples),
        num_truncated=num_truncated,
        tasks=scores,
    )
    for file in (options.output, options.output_dir and options.output_dir / RESULTS):
        if file is not None:
            write_results(file, record.to_dict())
    return record


def print_evaluation(record: EvaluationRecord) -> None:
    """Print the figures as tables on standard output, and what was left out or cut in a line each."""
    console = Console(highlight=False, markup=False)
    kind = "" if record.mask is None else f", PAT adapter on {record.base_model}, mask {record.mask}"
    console.print(f"{record.model} ({record.num_parameters:,} parameters, {record.dtype}{kind})")
    rows = [
        [source or "", f"{nll.num_tokens:,}", f"{nll.nll:.4f}", f"{nll.perplexity:,.2f}"]
        for source, nll in ((record.text_file, record.text), (record.dataset_name, record.responses))
        if nll is not None
    ]
    if rows:
        console.print(_table(["", "tokens", "NLL", "perplexity"], rows))
    if record.tasks is not None:
        console.print(_table(*score_table(record.tasks)))
        console.print("Accuracy in %, ± standard error.")
        for protocol, number in record.tasks.num_truncated().items():
            console.print(
                f"{number:,} questions asked by {protocol} lost their beginning: the model reads fewer tokens."
            )
    if record.num_truncated:
        console.print(
            f"{record.num_truncated} rows were left out: no response token fits into {record.max_length} tokens."
        )


def score_table(scores: TaskScores) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of accuracies in percent with standard errors, a row a task, and their unweighted mean.

    Beside the accuracy by letter stands the share of the answers that hold no letter.
    """
    asked = {score.protocol for score in scores.scores}
    columns = [
        (heading, protocol, metric)
        for heading, protocol, metric in (
            ("letter", "letter", "acc"),
            ("no letter", "letter", "no_letter"),
            ("likelihood", "likelihood", "acc"),
            ("per character", "likelihood", "acc_norm"),
        )
        if protocol in asked
    ]
    rows = []
    for task in dict.fromkeys(score.task for score in scores.scores):
        found = {protocol: scores.get(task, protocol) for protocol in asked}
        count = next(score.num_questions for score in found.values() if score is not None)
        cells = [
            _percent(getattr(found[protocol], metric), getattr(found[protocol], f"{metric}_stderr", None))
            for _, protocol, metric in columns
        ]
        rows.append([task, f"{count:,}", *cells])
    means = [_percent(scores.mean(*column), scores.mean_stderr(*column)) for _, *column in columns]
    return ["task", "questions", *(heading for heading, _, _ in columns)], [*rows, ["mean", "", *means]]


def _percent(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if stderr is None else f"{100 * value:.2f} ± {100 * stderr:.2f}"


def _table(headings: list[str], rows: list[list[str]]) -> Table:
    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _is_adapter(model: str) -> bool:
    return (Path(model).expanduser() / "adapter_config.json").is_file()


def _has_tokenizer(model: str) -> bool:
    return (Path(model).expanduser() / "tokenizer_config.json").is_file()


def _examples(options: EvaluateOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenise the rows to score; also return how many lose their whole response."""
    if options.dataset_name is None:
        return [], 0
    template = cast(TemplateChoice, options.template)
    rows = load_training_data(options.dataset_name, tokenizer=tokenizer, template=template, held_out=0).train
    if options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    num_truncated = check_truncation(tokenizer, rows, options.max_length)
    return tokenize_examples(tokenizer, rows, options.max_length), num_truncated


def _check_tokens(
    tokenizer: PreTrainedTokenizerBase, network: nn.Module, content: str | None, tasks: Mapping[str, Any]
) -> None:
    """Refuse texts with tokens that the model has no embedding for; a tokenizer may know more than ever occur."""
    num_embeddings = cast(Any, network).get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values()) < num_embeddings:
        return
    texts = [content] if content is not None else []
    texts += [row["prompt"] for task in tasks.values() for row in task.eval_docs]
    largest = max((max(tokenizer.encode(text), default=0) for text in texts), default=0)
    if largest >= num_embeddings:
        raise PatError(
            f"Got the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), but the model has embeddings "
            f"for {num_embeddings} tokens; use its own tokenizer, or resize its embedding and save both."
        )


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
