"""`pat plan`: the width taken, and the sizes, costs and memory that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from pat.errors import PatError
from pat.loading import load_config, stored_dtype
from pat.plan.costs import ModelCost, build_skeleton, cost_of
from pat.plan.options import PlanOptions
from pat.plan.training import TrainingMemory, training_memory
from pat.recipes import recipe_defaults
from pat.shape import Width, legal_widths
from pat.surgery.dense import shrink_config
from pat.tuner.config import PatConfig
from pat.tuner.prepare import check_config

CONTEXT = 2048
"""Tokens that costs and memory refer to unless others are asked for; fewer if the model cannot read as many."""

NUM_NEIGHBOURS = 3
"""Legal widths shown on either side of the one taken."""

RECIPE = "default"
"""The recipe whose batch size and length the training memory is for."""


@dataclass(frozen=True)
class Plan:
    """What pruning a model comes to. Nothing here needs its weights."""

    model_name_or_path: str
    model_type: str
    dtype: str
    """Of the weights, base and pruned."""
    width: Width
    nearby_widths: tuple[int, ...]
    """Legal widths around the one taken, ascending, itself included."""
    rotation: str
    """What `rotation="auto"` comes to; a tied model's gains may still rule it out."""
    context: int
    base: ModelCost
    pruned: ModelCost
    training: TrainingMemory
    notes: tuple[str, ...]
    """What the reader has to know about these figures."""

    @property
    def prefill_speedup(self) -> float:
        """Expected factor where arithmetic is the limit (reading text, large batches): ratio of FLOPs."""
        return self.base.prefill_flops_per_token / self.pruned.prefill_flops_per_token

    @property
    def decode_speedup(self) -> float:
        """Expected factor where memory is the limit (generating, batch size 1): ratio of bytes read."""
        return self.base.decode_bytes_per_token / self.pruned.decode_bytes_per_token


def run_plan(options: PlanOptions) -> Plan:
    """Plan the pruning of a model from its configuration alone; see `make_plan`."""
    return make_plan(
        options.model_name_or_path,
        pruning_ratio=options.pruning_ratio,
        pruned_hidden_size=options.pruned_hidden_size,
        multiple_of=options.multiple_of,
        untie_word_embeddings=options.untie_word_embeddings,
        context=options.context,
    )


def make_plan(
    model_name_or_path: str,
    *,
    pruning_ratio: float | None = None,
    pruned_hidden_size: int | None = None,
    multiple_of: int | None = None,
    untie_word_embeddings: bool = False,
    context: int | None = None,
) -> Plan:
    """Plan the pruning of a model from its configuration alone.

    Args:
        model_name_or_path: a folder or hub id; only `config.json` is read.
        pruning_ratio: share of the hidden size to cut; 0.25 if neither this nor a width is given.
        pruned_hidden_size: exact width instead of a ratio.
        multiple_of: hard alignment of the width.
        untie_word_embeddings: give a tied model an output matrix of its own.
        context: tokens that costs and memory are for; by default 2048, or as many as the model can read.

    Raises:
        PatError: no such model, not a causal language model, unsupported family, no such width, or a context that the
            model cannot read.
    """
    base_config, family = load_config(model_name_or_path)
    context = _resolve_context(context, base_config)
    recipe = recipe_defaults(RECIPE)
    pat_config = PatConfig(
        task_type="CAUSAL_LM",
        pruning_ratio=pruning_ratio,
        pruned_hidden_size=pruned_hidden_size,
        multiple_of=multiple_of,
        untie_word_embeddings=untie_word_embeddings,
    )
    width = check_config(base_config, family, pat_config)
    dtype = stored_dtype(base_config) or torch.float32
    base = build_skeleton(base_config, family, dtype)
    small_config = shrink_config(
        base_config,
        family,
        pruned_hidden_size=width.pruned_hidden_size,
        head_dim=base.head_dim,
        tied=bool(base_config.tie_word_embeddings) and not untie_word_embeddings,
    )
    base_cost = cost_of(base, context)
    pruned_cost = cost_of(build_skeleton(small_config, family, dtype), context)
    training = training_memory(
        base, pat_config, batch_size=recipe["per_device_train_batch_size"], length=recipe["max_length"]
    )
    attached: PatConfig = cast(Any, base.model).peft_config["default"]  # the memory was counted on it
    return Plan(
        model_name_or_path=model_name_or_path,
        model_type=family.model_type,
        dtype=str(dtype).removeprefix("torch."),
        width=width,
        nearby_widths=_nearby(base_config.num_attention_heads, width, multiple_of),
        rotation=attached.resolved_rotation or "none",
        context=context,
        base=base_cost,
        pruned=pruned_cost,
        training=training,
        notes=tuple(_notes(base_config, pat_config, base_cost, pruned_cost, context)),
    )


def _resolve_context(context: int | None, base_config: Any) -> int:
    limit = getattr(base_config, "max_position_embeddings", None)
    if context is None:
        return min(CONTEXT, limit or CONTEXT)
    if context < 1 or (limit is not None and context > limit):
        most = "" if limit is None else f" to {limit}, the model's max_position_embeddings"
        raise PatError(f"Got context={context}; expected a number of tokens from 1{most}.")
    return context


def _nearby(num_attention_heads: int, width: Width, multiple_of: int | None) -> tuple[int, ...]:
    legal = legal_widths(width.hidden_size, num_attention_heads, multiple_of=multiple_of)
    position = legal.index(width.pruned_hidden_size)
    return tuple(legal[max(0, position - NUM_NEIGHBOURS) : position + NUM_NEIGHBOURS + 1])


def _notes(base_config: Any, pat_config: PatConfig, base: ModelCost, pruned: ModelCost, context: int) -> list[str]:
    notes = [
        "Prefill: 2 x matmul parameters + 4 x heads x head size x layers x mean number of keys, per token of a text of "
        f"{context} tokens; the head counts for the last of them only. Expected where arithmetic is the limit.",
        f"Decode: weights in use and cache, read per token after {context} tokens at batch size 1. Expected where "
        "memory bandwidth is the limit. Number and size of the attention heads, hence the cache, do not change.",
        f"Training: rank {pat_config.r} on every linear layer; adapter, gradients and Adam take 16 bytes per trainable "
        "parameter. Activations are an estimate; logits (computed in chunks) and the framework itself come on top.",
    ]
    if stored_dtype(base_config) is None:
        notes.append("The configuration does not name the weights' dtype; bytes are for float32.")
    if getattr(base_config, "quantization_config", None) is not None:
        notes.append("The base is quantised; sizes are those of the dequantised weights, which the merge writes.")
    if base.tied and not pruned.tied:
        extra = pruned.groups["head"].num_parameters
        notes.append(f"Untying gives the pruned model a head of {extra:,} parameters of its own.")
    return notes
