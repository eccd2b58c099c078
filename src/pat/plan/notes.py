"""The notes below the tables of a plan: what its figures leave out, and what they were counted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pat.loading import quantization_of, stored_dtype
from pat.plan.candidate import Candidate
from pat.plan.cpu import CpuTime
from pat.plan.guide import MODEL_FLOPS_UTILISATION
from pat.shape import LARGE_RATIO, Shape
from pat.surgery.costs import ModelCost
from pat.tuner.config import PatConfig


def notes_of(
    base_config: Any,
    pat_config: PatConfig,
    base: ModelCost,
    candidates: Sequence[Candidate],
    context: int,
    *,
    cpu: CpuTime | None,
    is_measured: bool,
) -> list[str]:
    """Return the sentences that the reader of a plan's figures has to know.

    Args:
        base_config: of the base model.
        pat_config: of the adapter.
        base: cost of the base.
        candidates: shapes of the plan.
        context: number of tokens that costs are for.
        cpu: time on this machine's CPU, where it was measured.
        is_measured: whether the shapes were measured on data.
    """
    notes = [
        "Prefill (reading a text): 2 x matmul parameters + 4 x heads x head size x layers x mean number of keys, per "
        f"token of a text of {context} tokens; the head counts for the last of them only. The speed is expected where "
        "arithmetic is the limit.",
        f"Decode (writing one): weights in use and cache, read per token after {context} tokens at batch size 1. The "
        f"speed is expected where memory bandwidth is the limit. {_cache_note(candidates[-1].shape, base_config)}",
        _memory_note(base_config, pat_config, [candidate.shape for candidate in candidates]),
        f"Times on GPUs: FLOPs at {MODEL_FLOPS_UTILISATION:.0%} of the peak in the data sheet, which models below a "
        f"billion parameters do not reach; computed, not measured. {_cpu_note(cpu)}Padding, and choosing and cutting, "
        "minutes, come on top.",
        "What cuts have cost elsewhere was measured on two small models after little training, and on no others."
        + ("" if is_measured else " --calibrate DATA measures yours before training."),
        "Fine-tuning forgets: while the loss on rows like those of the data falls, that on general text rises. `pat "
        "tune` measures both on the base and on the small model: general_nll in results.json, and in its report.",
    ]
    if stored_dtype(base_config) is None:
        notes.append("The configuration does not name the weights' dtype; bytes are for float32.")
    elif pat_config.target_bytes is not None and stored_dtype(base_config) == torch.float32:
        notes.append("target_bytes is for float32, as the base is stored; in bfloat16 the model takes half of that.")
    if getattr(base_config, "quantization_config", None) is not None:
        notes.append("The base is quantised; sizes are those of the dequantised weights, which the merge writes.")
    if any(candidate.pruning_ratio > LARGE_RATIO for candidate in candidates):
        notes.append("Cutting more than half of a model has not been shown to work; expect a much worse model.")
    if base.tied and not candidates[0].cost.tied:
        heads = (f"{candidate.cost.groups['head'].num_parameters:,}" for candidate in candidates)
        notes.append(f"Untying gives the pruned model a head of {' or '.join(heads)} parameters of its own.")
    return notes


def _cache_note(shape: Shape, base_config: Any) -> str:
    if not shape.cuts("layers") and not shape.cuts("heads"):
        return "Number and size of the attention heads, hence the cache, do not change."
    if shape.cuts("layers") and len(set(getattr(base_config, "layer_types", None) or ())) > 1:
        return "Its layers have caches of several sizes; here the last ones go, tuning chooses by what is lost."
    return "The size of the attention heads does not change; the cache shrinks with their number, or the layers'."


def _cpu_note(time: CpuTime | None) -> str:
    if time is None:
        return ""
    if not time.fits:
        return "Training does not fit into this machine's memory, so that nothing was timed on its CPU. "
    return "Time on this CPU: a layer and the head were timed, and their FLOPs carry it over to the models. "


def _memory_note(base_config: Any, config: PatConfig, shapes: Sequence[Shape]) -> str:
    """Say what the columns of the training's memory hold for, and where `pat tune` announces another figure."""
    at_first = (
        "the cut comes before the first step, so that training takes the column of the cut; before it channels are "
        "chosen, without an optimizer"
    )
    later = "training takes the column before the cut up to the milestone, and that of the cut after it"
    cuts_hidden = {shape.cuts("hidden") for shape in shapes}
    if quantization_of(base_config) is not None:
        first = "The base is quantised, so that training stays at its width to the end."
    elif len(cuts_hidden) > 1:
        first = f"Where the hidden size is cut, {later}; else {at_first}."
    else:
        first = f"{(later if cuts_hidden == {True} else at_first).capitalize()}."
    if len(shapes) > 1:
        first += " The column before it is that of the last of the cuts."
    in_float32 = (
        ""
        if stored_dtype(base_config) in (None, torch.float32)
        else ", and for weights in float32 where it trains on a CPU"
    )
    return (
        f"Memory for training: {first} `pat tune` announces the column before the cut as the most that it takes, for "
        f"the longest row of the data in place of the length here{in_float32}. Rank {config.r} on every linear layer; "
        "adapter, gradients and Adam take 16 bytes per trained parameter; before the cut the basis of a rotation and "
        "what fills in for MLP channels come on top. Activations are an estimate, of which --gradient_checkpointing "
        "saves most; logits (computed in chunks) and the framework itself come on top."
    )
