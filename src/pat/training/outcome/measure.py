"""Measure the models of a run on held-out rows and general text, and warn of their losses."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import nn

from pat.errors import one_line
from pat.file_sizes.predict import file_sizes, vocabulary_entries
from pat.nll import IGNORED, Example, paired_standard_error, response_nll_by_row
from pat.report import numbers
from pat.report.page import STAGES
from pat.report.progress import progress_bar
from pat.surgery.costs import Skeleton, build_skeleton, cost_of, usual_context
from pat.training.inputs.prepare import Prepared
from pat.training.outcome.results import ModelFigures, Size

logger = logging.getLogger(__name__)

EVAL_BATCH_SIZE = 8

MUCH_FORGOTTEN = 0.25
"""Nats per token of general text above the base's loss that are warned of: its perplexity is then 28 % higher. Every
tuning moves it a little, and a warning that each run gives would not be read."""

WHAT_HELPED = (
    "Cut less (on a small model half the cut halved the distance to LoRA on the whole one), or train on more tokens "
    "(0.08 nats for nearly three times as many on SmolLM2-135M)."
)
"""Advice on a loss above the base's, with the gain where it was measured (`docs/experiments.md`): the cut on
stories260K, the tokens on SmolLM2-135M at 25 %, one seed. The default rate is the best of those that were tried."""


def measure(
    model: nn.Module, data: Prepared, stage: str, size: Size, rows: dict[str, torch.Tensor] | None = None
) -> ModelFigures:
    """Measure a model on the held-out rows and on general text, on its own device and in its own dtype.

    Args:
        model: the model.
        data: with the rows and the text.
        stage: `base`, `tuned` or `dense`.
        size: is given, because quantised storage holds several weights in one element.
        rows: takes down the losses of the held-out rows by stage, and those of the windows of general text by
            `general_rows` of it; where it has those of the base, the difference to it has a standard error.
    """
    rows = {} if rows is None else rows
    found = asdict(size) | _on_held_out(model, data, stage, rows) | _on_general_text(model, data, stage, rows)
    if stage != "tuned":
        config = cast(Any, model).config
        skeleton = build_skeleton(config, torch.bfloat16)
        found["flops_per_token"] = cost_of(skeleton, usual_context(config)).prefill_flops_per_token
        found["gguf_bytes"] = _gguf_bytes(skeleton)
    return ModelFigures(**found)


def _gguf_bytes(skeleton: Skeleton) -> dict[str, int] | None:
    config = skeleton.model.config
    try:
        # By the name alone, as a plan does it: the same tokenizer, unless a revision was asked for that has another.
        vocabulary, uncounted = vocabulary_entries(str(config.name_or_path), config.get_text_config().vocab_size)
        return None if uncounted else file_sizes(skeleton, vocabulary)[0].gguf or None
    except Exception as error:  # whatever an odd tokenizer raises: no run ends for the lack of this figure
        logger.warning("The size of files for llama.cpp is not known (%s).", one_line(error))
        return None


def _on_held_out(model: nn.Module, data: Prepared, stage: str, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    examples, of_base = data.held_out, data.held_out_of_base
    if not examples:
        return {}
    if of_base is not None and stage == "base":
        examples = of_base
    pad_token_id = 0 if examples is of_base else cast(int, data.vocabulary.tokenizer.pad_token_id)  # padding is masked
    with progress_bar(f"Scoring held-out rows with the {STAGES[stage]} model", "batches") as bar:
        start = time.perf_counter()
        nll, rows[stage] = response_nll_by_row(
            model, examples, batch_size=EVAL_BATCH_SIZE, pad_token_id=pad_token_id, progress=bar
        )
        speed = sum(len(example["input_ids"]) for example in examples) / (time.perf_counter() - start)
    # One unit for all models of a run: other tokens of the same text are so many of the base's.
    num_tokens = nll.num_tokens if of_base is None else sum(map(_num_scored, of_base))
    by_source: list[float | None] | None = None
    if data.held_out_groups:
        counted, totals = [0] * len(data.record.sources), [0.0] * len(data.record.sources)
        losses = rows[stage][:, 0].tolist()
        for group, example, loss in zip(data.held_out_groups, of_base or data.held_out, losses, strict=True):
            counted[group] += _num_scored(example)
            totals[group] += loss
        by_source = [total / num if num else None for total, num in zip(totals, counted, strict=True)]
    return {
        "held_out_nll": nll.per(num_tokens).nll,
        "held_out_standard_error": nll.per(num_tokens).standard_error,
        "held_out_difference_error": paired_standard_error(rows[stage], rows["base"])
        if stage != "base" and "base" in rows
        else None,
        "num_held_out_tokens": num_tokens,
        "held_out_nll_by_source": by_source,
        "tokens_per_second": speed,
    }


def general_rows(stage: str) -> str:
    """Return the key of the losses of a model on the windows of general text."""
    return f"{stage}, general text"


def _on_general_text(model: nn.Module, data: Prepared, stage: str, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    if (text := data.general) is None:
        return {}
    windows = text.windows_of_base if stage == "base" else text.windows
    with progress_bar(f"Scoring general text with the {STAGES[stage]} model", "batches") as bar:
        nll, rows[general_rows(stage)] = response_nll_by_row(
            model, windows, batch_size=EVAL_BATCH_SIZE, pad_token_id=0, progress=bar
        )  # padding is masked
    num_tokens = sum(map(_num_scored, text.windows_of_base))
    of_base = rows.get(general_rows("base"))
    # In a trimmed vocabulary windows begin and end elsewhere in the text.
    is_paired = stage != "base" and of_base is not None and text.windows is text.windows_of_base
    return {
        "general_difference_error": paired_standard_error(rows[general_rows(stage)], cast(torch.Tensor, of_base))
        if is_paired
        else None,
        "general_nll": nll.per(num_tokens).nll,
        "general_standard_error": nll.per(num_tokens).standard_error,
        "num_general_tokens": num_tokens,
    }


def _num_scored(example: Example) -> int:
    """Return the number of tokens of an example that `response_nll` scores."""
    return sum(label != IGNORED for label in example["labels"][1:])


NEAR_GUESSING = 0.01
"""Nats below a uniform choice within which a model still guesses: equal logits may come out below it by rounding."""


def warn_of_losses(figures: Mapping[str, ModelFigures], vocab_size: int) -> None:
    """Say so if tuning has made the model worse than its base, or no better than guessing."""
    base, dense = figures["base"].held_out_nll, figures["dense"].held_out_nll
    if base is None or dense is None:
        return
    if not dense < math.log(vocab_size) - NEAR_GUESSING:
        logger.warning(
            "The model is no better than guessing: its held-out loss is %.3f, and a uniform choice among %d tokens has "
            "%.3f. Train longer, cut less, or lower the learning rate.",
            dense,
            vocab_size,
            math.log(vocab_size),
        )
    elif dense > base:
        error = figures["dense"].held_out_difference_error
        is_worse = error is None or numbers.is_told_apart(dense - base, error)
        logger.warning(
            "The model is %s on the held-out rows (%.3f against %.3f nats per token, a difference of %s). %s",
            "worse than its base" if is_worse else "not better than its base, and not told apart from it,",
            dense,
            base,
            numbers.difference(dense - base, error),
            WHAT_HELPED,
        )


def warn_of_forgetting(figures: Mapping[str, ModelFigures]) -> None:
    """Say so if general text has become much harder for the model than for its base, and what helps."""
    base, dense = figures["base"], figures["dense"]
    if base.general_nll is not None and dense.general_nll is not None and has_forgotten_much(base, dense):
        logger.warning(
            "The model has forgotten much: its loss on general text is %.3f nats per token, its base's %.3f (%s). "
            "Train on more tokens, cut less, or mix general data in (--dataset_name yours.jsonl general.jsonl "
            "--dataset_weights 7 3).",
            dense.general_nll,
            base.general_nll,
            numbers.difference(dense.general_nll - base.general_nll, dense.general_difference_error),
        )


def has_forgotten_much(base: ModelFigures, dense: ModelFigures) -> bool:
    """Tell whether general text has become much harder, beyond what so little text leaves open; not without it."""
    if base.general_nll is None or dense.general_nll is None:
        return False
    error = dense.general_difference_error
    if error is None:  # of other windows: as if the two had nothing to do with each other, which is too large
        error = math.hypot(base.general_standard_error or 0.0, dense.general_standard_error or 0.0)
    distance = dense.general_nll - base.general_nll
    return distance > MUCH_FORGOTTEN and numbers.is_told_apart(distance, error)
