"""Facts of a training that the record of a run and the model card both say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat.checkpoint.card import shown_name
from pat.method.schedule import milestone_step
from pat.training.arguments import TuneArguments
from pat.training.inputs.prepare import Prepared
from pat.training.outcome.results import ModelFigures
from pat.training.run.trained import Trained


def recorded_facts(arguments: TuneArguments, data: Prepared, trained: Trained) -> dict[str, Any]:
    """Return what record and card both say of a training."""
    rate, pat = float(arguments.sft.learning_rate), arguments.pat
    sizes, base = trained.pat_config["resolved_width"], trained.pat_config["base_shape"]
    cuts_hidden = sizes["hidden_size"] < base["hidden_size"]  # else there are no operators
    milestone = pat.milestone_share(cuts_hidden=cuts_hidden)
    rates, has_soft_steps = {"LoRA": rate}, milestone_step(milestone, trained.num_steps) > 0
    if has_soft_steps and pat.mask == "trainable":
        rates["mask"] = rate * pat.mask_lr_multiplier
    if cuts_hidden and (has_soft_steps or trained.compaction is None):
        rates["operators"] = rate * pat.operator_lr_multiplier
    formats = {"chat": "the chat template of the tokenizer", "alpaca": "the Alpaca template"}
    if data.vocabulary.writes_alpaca:
        formats["alpaca"] += ", written as the chat template"
    templates = (trained.data.template or "").split(", ")
    return {
        "recipe": arguments.run.recipe,
        "seed": arguments.sft.seed,
        "num_steps": trained.num_steps,
        "num_tokens_seen": trained.num_tokens_seen,
        "prompt_format": " or ".join(formats.get(template, "none, texts as they are") for template in templates),
        "learning_rates": rates,
    }


def provenance(
    arguments: TuneArguments, data: Prepared, trained: Trained, figures: Mapping[str, ModelFigures]
) -> dict[str, Any]:
    """Return what is known of a model for its card, see `render_card`; `figures` are those that are known by then."""

    def known(name: str) -> dict[str, Any]:
        values = {stage: getattr(found, name) for stage, found in figures.items()}
        return {stage: value for stage, value in values.items() if value is not None}

    return recorded_facts(arguments, data, trained) | {
        "model_name_or_path": arguments.run.model_name_or_path,
        "dataset": ", ".join(map(shown_name, arguments.run.dataset_names)),
        "max_length": arguments.sft.max_length,
        "is_compacted": trained.compaction is not None,
        "teacher": trained.teacher.describe() if trained.teacher else None,
        "held_out_nll": known("held_out_nll"),
        "held_out_standard_error": known("held_out_standard_error"),
        "held_out_difference_error": known("held_out_difference_error"),
        "general_nll": known("general_nll"),
        "flops_per_token": known("flops_per_token"),
        "base_bytes": figures["base"].num_bytes,
        "num_held_out_tokens": figures["base"].num_held_out_tokens,
    }
