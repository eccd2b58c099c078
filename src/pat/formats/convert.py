"""`pat convert`: an adapter of the paper's published code becomes a dense checkpoint, verified on text."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from pat.checkpoint.adapter_tokens import adapter_tokens
from pat.checkpoint.card import Cut, shown_name
from pat.checkpoint.fitting import fitting
from pat.checkpoint.merge import check_writing, form_of
from pat.checkpoint.places import RESULTS
from pat.checkpoint.staging import staged_folder
from pat.checkpoint.verify import Parity
from pat.checkpoint.write import save_checkpoint
from pat.errors import PatError
from pat.formats.options import ConvertOptions
from pat.formats.published import PublishedAdapter, read_published
from pat.loading import check_quantization, load_base, load_config
from pat.loading.weights import resolve_device
from pat.method.operator import DenseOperator
from pat.paths import expand
from pat.report.records import Record, collected_warnings, write_record
from pat.surgery.residual import ResidualStream
from pat.tuner import PatConfig, PatModel, find_tuner
from pat.widths import legal_widths

logger = logging.getLogger(__name__)

_OF_LORA = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Fields of its configuration that decide what LoRA computes; peft's defaults hold, not those of `PatConfig`."""

_UNTOUCHED_BASE = (None, True, False, "gaussian")
"""Initialisations of LoRA that leave the base as it is."""


@dataclass(frozen=True, kw_only=True)
class ConvertRecord(Record):
    """The result of a conversion. Only the last component of a path is kept."""

    command: Literal["convert"] = "convert"
    model_name_or_path: str
    """The base model."""
    num_kept: int
    """Number of channels that the adapter keeps."""
    num_padded: int
    """Number of channels of zeros beside them, which make the width one that transformers loads."""
    cut: Cut
    parity: Parity
    timings: dict[str, float]


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion: where the model is, and its record."""

    model_dir: Path
    record: ConvertRecord


def print_convert(result: ConvertResult) -> None:
    """Print where the checkpoint is, and how exact."""
    record = result.record
    padded = f", {record.num_padded} of them zeros" if record.num_padded else ""
    print(
        f"Wrote {result.model_dir} ({record.cut.num_parameters:,} parameters, hidden size "
        f"{record.cut.pruned_hidden_size}{padded}); {record.parity.describe()}"
    )


def run_convert(options: ConvertOptions, *, progress: bool = True) -> ConvertResult:
    """Write the dense checkpoint of an adapter of the published code, with a model card and `results.json`.

    The number of channels that a trained mask of that code keeps is what it came to. Where transformers loads no model
    of that width, channels of zeros are added up to the next one that it does, which changes nothing but the size.
    A tied model becomes an untied one: the code transforms what the embedding gives, and not what the head reads.

    Raises:
        PatError: the adapter, the base model or the output folder cannot be used; nothing has been written.
        RunFailed: the checkpoint could not be written, or is not the adapted model; nothing is left behind.
    """
    with collected_warnings() as warnings:
        check_writing(options)
        device = resolve_device(options.device)
        published = read_published(options.adapter)
        keep = published.keep(options.pruned_hidden_size)
        name = options.base_model or expand(str(published.config.get("base_model_name_or_path") or ""))
        if not name:
            raise PatError(f"{options.adapter}: does not say which base model it belongs to; pass --base_model.")
        base_config, family = load_config(name)
        check_quantization(base_config)
        width = _width(base_config, family.hidden_size_field, keep)
        form = form_of(options, adapter_tokens(options.adapter, name, base_config), base_config)
        base: Any = load_base(name)
        model = adapted(base.to(device), published, keep, width, str(options.adapter), name)
        timings: dict[str, float] = {}
        with staged_folder(options.output_dir) as staging:
            provenance = {"model_name_or_path": name}
            parity, cut = save_checkpoint(
                model, staging, provenance=provenance, progress=progress, timings=timings, **form
            )
            num_kept = int(keep.sum())
            record = ConvertRecord(
                model_name_or_path=shown_name(name),
                num_kept=num_kept,
                num_padded=width - num_kept,
                cut=cut,
                parity=parity,
                timings=timings,
                warnings=warnings,
            )
            write_record(staging / RESULTS, record)
    return ConvertResult(Path(options.output_dir), record)


def adapted(
    base: PreTrainedModel, published: PublishedAdapter, keep: Tensor, width: int, adapter: str, name: str
) -> PeftModel:
    """Put an adapter of the published code on its base, as a PAT adapter whose mask is hard.

    Args:
        base: the base model.
        published: the adapter.
        keep: channels that stay, boolean `(d,)`.
        width: number of channels of the dense model, at least as many.
        adapter: name of the adapter, for messages.
        name: name of the base, for messages.

    Raises:
        PatError: adapter and base do not fit each other.
    """
    stored, plain = published.config, LoraConfig()
    fields = {key: getattr(plain, key) if stored.get(key) is None else stored[key] for key in _OF_LORA}
    if stored.get("init_lora_weights") not in _UNTOUCHED_BASE or stored.get("fan_in_fan_out"):
        raise PatError(
            f"{adapter}: has init_lora_weights={stored.get('init_lora_weights')!r} and fan_in_fan_out="
            f"{stored.get('fan_in_fan_out')!r}; expected LoRA that leaves the base's matrices as they are."
        )
    config = PatConfig(
        task_type="CAUSAL_LM",
        axes=["hidden"],
        pruned_hidden_size=width,
        rotation="none",
        operator_rank="dense",
        untie_word_embeddings=bool(base.config.tie_word_embeddings),
        **fields,
    )
    with fitting(name, adapter):
        model = cast(PeftModel, get_peft_model(base, config))
        given: Any = set_peft_model_state_dict(model, published.lora)
    if given.unexpected_keys:
        raise PatError(f"{adapter}: has the tensor {given.unexpected_keys[0]}, for which {name} has no place.")
    if lacking := [key for key in given.missing_keys if ".lora_" in key]:
        raise PatError(f"{adapter}: lacks {len(lacking)} of LoRA's tensors, such as {lacking[0]}; it is not complete.")
    tuner = cast(PatModel, find_tuner(model))
    stream = cast(ResidualStream, tuner.residual_stream)
    if any(branch.post_norm is not None for branch in stream.branches):
        raise PatError(f"{name}: has norms behind its branches, where the published code knows no place to act.")
    if any(branch.site != branch.writer.path for branch in stream.branches):
        raise PatError(f"{name}: has a mixture of experts, which the published code does not know.")
    keys = [(-1, 0), *((index // 2, index % 2) for index in range(len(stream.branches)))]
    operators = tuner.operators()
    if set(keys) != set(published.places):
        raise PatError(
            f"{adapter}: acts on the stream at {len(published.places)} places, {name} has {len(keys)}; expected the "
            "base that it was trained on."
        )
    with torch.no_grad():
        for key, operator in zip(keys, operators.values(), strict=True):
            # With rows of zeros for all that does not stay, the channels that fill up the width are zero.
            change = published.places[key].matrix(keep) - torch.eye(len(keep), dtype=torch.float64)
            cast(DenseOperator, operator).matrix.copy_(change)
        cast(Tensor, tuner.mask().weight).copy_(_with_padding(keep, width).float() - 0.5)
    tuner.set_step(1, 1)
    return model.eval()


def _width(base_config: Any, hidden_size_field: str, keep: Tensor) -> int:
    """Return the smallest width that transformers loads and all kept channels fit into.

    Raises:
        PatError: the adapter is for another hidden size, or no smaller width is legal.
    """
    hidden_size, num_kept = int(getattr(base_config, hidden_size_field)), int(keep.sum())
    if len(keep) != hidden_size:
        raise PatError(
            f"Got an adapter for {len(keep)} channels and a base of {hidden_size}; expected the base that it was "
            "trained on; pass it with --base_model."
        )
    fitting_widths = [w for w in legal_widths(hidden_size, base_config.num_attention_heads) if w >= num_kept]
    if not fitting_widths:
        raise PatError(
            f"Got an adapter that keeps {num_kept} of {hidden_size} channels; no smaller hidden size is a multiple of "
            f"the {base_config.num_attention_heads} heads, so that there is nothing to be cut."
        )
    if fitting_widths[0] > num_kept:
        logger.warning(
            "The adapter keeps %d channels, which is no multiple of the %d heads: %d channels of zeros are added.",
            num_kept,
            base_config.num_attention_heads,
            fitting_widths[0] - num_kept,
        )
    return fitting_widths[0]


def _with_padding(keep: Tensor, width: int) -> Tensor:
    """Return the channels that stay, and the first of the others up to a width, boolean `(d,)`."""
    padded = keep.clone()
    padded[(~keep).nonzero().squeeze(1)[: width - int(keep.sum())]] = True
    return padded
