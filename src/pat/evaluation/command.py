"""`pat evaluate`: perplexity on a text, likelihood of responses, accuracy on tasks; of a checkpoint or an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from pat.checkpoint.adapter import base_config_for, base_of, load_adapted, read_adapter_config
from pat.checkpoint.adapter_tokens import adapter_tokens
from pat.checkpoint.card import shown_name
from pat.checkpoint.places import RESULTS
from pat.data.conversion import TemplateChoice
from pat.data.examples import prepare_examples
from pat.data.record import DataRecord
from pat.data.vocabulary import Vocabulary
from pat.errors import PatError
from pat.evaluation.harness import TaskScores, evaluate_tasks, load_tasks
from pat.evaluation.options import COMMAND, EvaluateOptions
from pat.families import get_family
from pat.loading import load_base, load_config, load_tokenizer, padded
from pat.loading.weights import resolve_device
from pat.nll import NLL, Example, read_text, response_nll, text_perplexity
from pat.report.progress import bars_of_datasets, progress_bar
from pat.report.records import Record, collected_warnings, write_record
from pat.report.table import Table
from pat.training.preflight.threads import restored_threads, threads_for
from pat.tuner.model import find_tuner

TOKENS_PER_LIMIT = 1000


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Record):
    """Figures of one model. Only the last component of a path is kept."""

    command: str = COMMAND
    model: str
    model_digest: str
    """Digest of the model's full path or hub id, which tells models apart whose last component is the same."""
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
    data: DataRecord | None
    """The contents of the data, and what of it was cut."""
    responses: NLL | None
    """Figures over the response tokens of the data."""
    tasks: TaskScores | None
    """Accuracy on tasks."""


def run_evaluate(options: EvaluateOptions) -> EvaluationRecord:
    """Measure a model on a text, on instruction data, on tasks, or on several of them.

    Raises:
        PatError: model, text, data or questions cannot be used.
    """
    with collected_warnings() as warnings, bars_of_datasets(), restored_threads():
        record = _evaluate(options, warnings)
    for file in (options.output, options.output_dir and options.output_dir / RESULTS):
        if file is not None:
            write_record(file, record)
    return record


def _evaluate(options: EvaluateOptions, warnings: list[str]) -> EvaluationRecord:
    # Everything is read before the weights: a wrong column should not take minutes to be found.
    adapter = read_adapter_config(options.model) if os.path.isfile(Path(options.model) / CONFIG_NAME) else None
    if adapter is None and options.base_model is not None:
        raise PatError(
            f"Got base_model={options.base_model} beside the model {options.model}, which is no adapter; leave it out."
        )
    name, revision = (options.model, None) if adapter is None else base_of(options.model, adapter, options.base_model)
    if adapter is None:
        config, _ = load_config(name)
        tokenizer = load_tokenizer(name, config=config)
    else:
        config, _ = base_config_for(options.model, adapter, name, revision=revision)
        tokenizer = padded(adapter_tokens(options.model, name, config, revision=revision).tokenizer, config)
    vocabulary = Vocabulary(tokenizer, config.get_text_config().vocab_size)
    content = None if options.text_file is None else read_text(options.text_file)
    tasks = None if options.tasks is None else load_tasks(options.tasks, options.protocol, options.data_dir)
    _check_tokens(vocabulary, content, tasks or {})
    examples: Sequence[Example] = ()
    data = None
    if options.dataset_name is not None:
        examples, data = prepare_examples(
            options.dataset_name,
            vocabulary,
            template=cast(TemplateChoice, options.template),
            max_length=options.max_length,
            limit=options.limit,
            config=config,
        )

    adapted = None if adapter is None else load_adapted(options.model, base_model=options.base_model)
    network: nn.Module = adapted or load_base(name)
    network = network.to(resolve_device("auto")).eval()
    if next(network.parameters()).device.type == "cpu":
        threads = threads_for(config, get_family(config.model_type))
        if threads is not None:
            torch.set_num_threads(threads.number)
    text = responses = scores = None
    if content is not None:
        max_tokens = None if options.limit is None else options.limit * TOKENS_PER_LIMIT
        with progress_bar("Scoring the text", "batches") as progress:
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
        with progress_bar("Scoring responses", "batches") as progress:
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
    return EvaluationRecord(
        warnings=warnings,
        model=shown_name(options.model),
        model_digest=options.model_digest,
        base_model=None if adapter is None else shown_name(name),
        mask=_describe_mask(network),
        num_parameters=_num_parameters(network),
        dtype=str(next(network.parameters()).dtype).removeprefix("torch."),
        max_length=options.max_length,
        text_file=None if options.text_file is None else options.text_file.name,
        text=text,
        dataset_name=None if data is None else data.source,
        data=data,
        responses=responses,
        tasks=scores,
    )


def _num_parameters(network: nn.Module) -> int:
    """Count parameters by the libraries' own functions, which know what a quantised weight stands for."""
    if isinstance(network, PeftModel):
        return network.get_nb_trainable_parameters()[1]
    return cast(PreTrainedModel, network).num_parameters()


def print_evaluation(record: EvaluationRecord) -> None:
    """Print the figures as tables on standard output."""
    kind = "" if record.mask is None else f", PAT adapter on {record.base_model}, mask {record.mask}"
    print(f"{record.model} ({record.num_parameters:,} parameters, {record.dtype}{kind})")
    rows = [
        [source or "", f"{figures.num_tokens:,}", _with_error(figures.nll, figures.standard_error, 4), perplexity]
        for source, figures in ((record.text_file, record.text), (record.dataset_name, record.responses))
        if figures is not None and (perplexity := f"{figures.perplexity:,.2f}")
    ]
    if rows:
        Table("", ["", "tokens", "NLL ± standard error", "perplexity"], rows).print()
    if record.tasks is not None:
        score_table(record.tasks).print()


def score_table(scores: TaskScores) -> Table:
    """Return a table of accuracies in percent with their standard errors, a row a task, and their unweighted mean.

    Beside the accuracy by letter stands the share of the answers that hold no letter.
    """
    columns = [
        (heading, protocol, metric)
        for heading, protocol, metric in (
            ("letter", "letter", "acc"),
            ("no letter", "letter", "no_letter"),
            ("likelihood", "likelihood", "acc"),
            ("per character", "likelihood", "acc_norm"),
        )
        if protocol in scores.mean
    ]
    rows = []
    for task in dict.fromkeys(score.task for score in scores.scores):
        found = {score.protocol: score for score in scores.scores if score.task == task}
        cells = []
        for _, protocol, metric in columns:
            value, error = (getattr(found[protocol], name, None) for name in (metric, f"{metric}_stderr"))
            cells.append(_percent(value, error))
        rows.append([task, f"{next(iter(found.values())).num_questions:,}", *cells])
    means = [_percent(scores.mean[p][metric], scores.mean_stderr[p][metric]) for _, p, metric in columns]
    headings = ["task", "questions", *(heading for heading, _, _ in columns)]
    return Table("Accuracy in %, ± standard error", headings, [*rows, ["mean", "", *means]], num_totals=1)


def _percent(value: float | None, error: float | None) -> str:
    return "–" if value is None else _with_error(100 * value, error and 100 * error, 2)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def _check_tokens(vocabulary: Vocabulary, content: str | None, tasks: Mapping[str, Any]) -> None:
    """Refuse texts with tokens that the model has no embedding for; a tokenizer may know more than ever occur."""
    tokenizer = vocabulary.tokenizer
    if max(tokenizer.get_vocab().values()) < vocabulary.num_embeddings:
        return
    texts = [content] if content is not None else []
    texts += [row["prompt"] for task in tasks.values() for row in task.eval_docs]
    vocabulary.check(max((max(tokenizer.encode(text), default=0) for text in texts), default=0))


def _describe_mask(network: nn.Module) -> str | None:
    tuner = find_tuner(network)
    if tuner is None:
        return None
    mask = tuner.mask()
    return "hard" if mask.hardened else f"soft at step {mask.step}"
