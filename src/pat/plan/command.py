"""`pat plan`: the widths taken, and the sizes, costs and memory that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from pat.checkpoint.card import shown_name
from pat.data.vocabulary import check_vocabulary_size, trimmed_budget
from pat.errors import PatError
from pat.families import Family
from pat.file_sizes.predict import FileSizes, file_sizes, vocabulary_entries
from pat.loading import load_config, quantization_of, stored_dtype
from pat.nll import max_positions
from pat.plan.after_cut import memory_after_cut
from pat.plan.candidate import Candidate, candidate_of
from pat.plan.cpu import CpuTime, cpu_time
from pat.plan.curves import Measured
from pat.plan.guide import MEASURED_CUTS, MeasuredCut, TrainingTime, training_times
from pat.plan.notes import notes_of
from pat.plan.options import PlanOptions
from pat.plan.recommend import recommend
from pat.plan.sharding import ShardedMemory, sharded_memory
from pat.plan.target import named_target
from pat.plan.vocabulary import advise_smaller_vocabulary
from pat.recipes import recipe_defaults
from pat.report.records import Record
from pat.serving import trouble
from pat.shape import AXES
from pat.surgery.costs import ModelCost, build_skeleton, cost_of, pruned_config, usual_context
from pat.tuner.config import PatConfig
from pat.tuner.idle import warn_of_growth, warn_of_idle_options
from pat.tuner.memory import TrainingMemory, training_memory
from pat.tuner.prepare import check_config

RECIPE = "default"
"""The recipe whose batch size and length the training memory is for."""

Rotation = Literal["pca", "none", "open"]


@dataclass(frozen=True, kw_only=True)
class PlanRecord(Record):
    """The widths, sizes and costs that pruning a model leads to. Nothing here needs its weights."""

    command: Literal["plan"] = "plan"
    model_name_or_path: str
    model_type: str
    dtype: str
    """Dtype of the weights, base and pruned."""
    rotation: Rotation
    """The rotation that `rotation="auto"` leads to; open where it depends on the final gain, one of the weights."""
    context: int
    base: ModelCost
    base_files: FileSizes
    candidates: tuple[Candidate, ...]
    """One for each ratio, in the order in which they were given."""
    training: TrainingMemory
    """Memory of training before the cut, at the base's width, for the last of the ratios: the most that `pat tune`
    takes for that one."""
    training_after_cut: tuple[TrainingMemory, ...]
    """Memory of training each of the candidates from the cut on, which comes first unless the hidden size is cut; none
    for a quantised base, where training stays at the base's width."""
    sharded: ShardedMemory | None
    """The same on several GPUs, with FSDP2; None where their number was not given."""
    vocabulary_size: int | None
    """Tokens of the trimmed vocabulary; None where it is whole."""
    training_times: tuple[TrainingTime, ...]
    """Time of a million tokens of training on each of several GPUs, computed from their data sheets."""
    cpu_time: CpuTime | None
    """Time of a million tokens of training on this machine's CPU, from measurements; None where it was not asked
    for."""
    guide: tuple[MeasuredCut, ...]
    """Losses after cuts of other models, which were measured."""
    measured: Measured | None
    """Curves and shapes measured on data; None where none was given."""
    notes: tuple[str, ...]
    """Sentences that the reader of these figures has to know."""
    recommendation: str
    """Shape that is recommended, with the reason; its last line is the command for it."""


def run_plan(options: PlanOptions) -> PlanRecord:
    """Plan the pruning of a model from its configuration, and from its weights where there is data to calibrate on.

    Raises:
        PatError: no such model, not a causal language model, unsupported family, no such width, a context that the
            model cannot read, or data that cannot be used.
    """
    base_config, family = load_config(options.model_name_or_path)
    context = _resolve_context(options.context, base_config)
    dtype = stored_dtype(base_config) or torch.float32
    skeleton = build_skeleton(base_config, dtype)
    recipe = recipe_defaults(RECIPE)
    length = recipe["max_length"]
    base, base_in_training = cost_of(skeleton, context), cost_of(skeleton, length)
    vocabulary, uncounted = vocabulary_entries(options.model_name_or_path, base_config.vocab_size)
    base_files, _ = file_sizes(skeleton, vocabulary)
    file_notes = [uncounted] if uncounted and base_files.gguf else []
    if vocabulary and base_files.gguf and options.vocabulary_size is not None:
        file_notes.append(
            "GGUF sizes of the cut model are without a vocabulary, since which tokens stay is not known yet; those of "
            f"the base are with one, of {sum(entry.num_bytes for entry in vocabulary):,} bytes."
        )
    if options.vocabulary_size is not None:
        check_vocabulary_size(options.model_name_or_path, base_config, options.vocabulary_size)
    candidates, in_training, smalls = [], [], []
    for ratio in options.pruning_ratio or (None,):
        config = PatConfig(
            task_type="CAUSAL_LM",
            pruning_ratio=ratio,
            axes=options.axes,
            **{axis.option: getattr(options, axis.option) for axis in AXES.values()},
            **named_target(options),
            multiple_of=options.multiple_of,
            untie_word_embeddings=options.untie_word_embeddings,
        )
        trimmed = skeleton
        if options.vocabulary_size is not None:
            trimmed_config, config.pruning_ratio = trimmed_budget(config, base_config, options.vocabulary_size)
            trimmed = build_skeleton(trimmed_config, dtype)
        shape = check_config(trimmed.model.config, family, config)
        if config.untie_word_embeddings and base.tied:
            warn_of_growth(trimmed.model.config, shape)
        small_config = pruned_config(trimmed, shape, tied=base.tied and not options.untie_word_embeddings)
        small = build_skeleton(small_config, dtype)
        cost = cost_of(small, context)
        in_training.append(cost_of(small, length))
        files, unwritable = file_sizes(small, vocabulary if options.vocabulary_size is None else ())
        spoken = (unwritable, trouble(family.model_type, [name for name in AXES if shape.cuts(name)]))
        file_notes += [note for note in spoken if note and note not in file_notes]
        heads = small_config.num_attention_heads
        candidates.append(candidate_of(shape, heads, options.multiple_of, base, cost, files))
        smalls.append(small)
    trimmed_base = cost_of(trimmed, context)
    warn_of_idle_options(config, shape, tied=base.tied)
    batch_size = recipe["per_device_train_batch_size"]
    training = training_memory(trimmed, config, batch_size=batch_size, length=length)
    attached: PatConfig = cast(Any, trimmed.model).peft_config["default"]  # the memory was counted on it
    after_cut = [
        memory_after_cut(small, attached, candidate.shape, batch_size=batch_size, length=length)
        for small, candidate in zip(smalls, candidates, strict=True)
        if quantization_of(base_config) is None  # else training stays at full width
    ]
    rotation: Rotation = "none" if attached.resolved_rotation == "none" else "pca"
    on_this_cpu = None
    if options.cpu_time:
        whole = build_skeleton(base_config, dtype)  # the other one carries an adapter by now
        on_this_cpu = cpu_time(whole, base_in_training, tuple(in_training), training, shown=not options.json)
    measured = _measure(options, base_config, family, candidates[0].pruning_ratio)
    return PlanRecord(
        model_name_or_path=options.model_name_or_path,
        model_type=family.model_type,
        dtype=str(dtype).removeprefix("torch."),
        rotation="open" if rotation == "pca" and cost.tied else rotation,
        context=context,
        base=base,
        base_files=base_files,
        candidates=tuple(candidates),
        training=training,
        training_after_cut=tuple(after_cut),
        sharded=_shard(options, training, trimmed_base, cost, base_config),
        vocabulary_size=options.vocabulary_size,
        training_times=training_times(base_in_training, tuple(in_training), training),
        cpu_time=on_this_cpu,
        guide=MEASURED_CUTS,
        measured=measured,
        notes=(
            *notes_of(
                base_config, config, base, candidates, context, cpu=on_this_cpu, is_measured=measured is not None
            ),
            *filter(None, [advise_smaller_vocabulary(options, base_config, base)]),
            *file_notes,
        ),
        recommendation=recommend(options, [candidate.pruning_ratio for candidate in candidates], measured),
    )


def _shard(
    options: PlanOptions, training: TrainingMemory, base: ModelCost, small: ModelCost, base_config: Any
) -> ShardedMemory | None:
    if options.gpus is None:
        return None
    outside = [base.groups[name].num_bytes for name in ("embedding", "head") if name in base.groups]
    return sharded_memory(
        training,
        nodes=options.nodes,
        gpus=options.gpus,
        num_layers=int(base_config.num_hidden_layers),
        outside_bytes=sum(outside),
        small_bytes=small.total.num_bytes,
    )


def _measure(options: PlanOptions, base_config: Any, family: Family, pruning_ratio: float) -> Measured | None:
    if options.calibrate is None:
        return None
    from pat.plan.measure import measure_shapes  # imports TRL, which takes seconds

    measured = measure_shapes(
        options.model_name_or_path,
        options.calibrate,
        base_config,
        family,
        pruning_ratio=pruning_ratio,
        target=named_target(options),
        num_steps=options.shape_search_steps,
        shown=not options.json,
    )
    if options.figure is not None:
        from pat.plan.figure import draw

        draw(measured, f"{shown_name(options.model_name_or_path)} on {measured.dataset}", options.figure)
    return measured


def _resolve_context(context: int | None, base_config: Any) -> int:
    if context is None:
        return usual_context(base_config)
    limit = max_positions(base_config)
    if context < 1 or (limit is not None and context > limit):
        most = "" if limit is None else f" to {limit}, the model's max_position_embeddings"
        raise PatError(f"Got context={context}; expected a number of tokens from 1{most}.")
    return context
