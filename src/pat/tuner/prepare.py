"""Checks that an adapter fits a base model, and decides what exactly it will be, before anything is attached."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from pat.budget import choose_shape
from pat.errors import PatError
from pat.families import Family, get_family
from pat.loading import base_fingerprint, check_kind, check_quantization, empty_model, quantization_of
from pat.method.operator import check_rank
from pat.shape import AXES, Shape, asked_sizes
from pat.surgery.axes import prunable, sizes_of
from pat.surgery.describe import check_tie, head_dim, map_of
from pat.surgery.residual import ResidualStream
from pat.surgery.rotation import gain_block
from pat.tuner.config import PatConfig
from pat.tuner.idle import warn_of_another_base, warn_of_growth, warn_of_idle_options
from pat.tuner.target import ratio_of_target
from pat.tuner.zero import check_not_taken_apart

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttachmentPlan:
    """Everything that attaching an adapter to a model has to know."""

    stream: ResidualStream
    shape: Shape
    group_width: int
    """Number of channels before an attention's writer for each key/value head."""
    rotation: str
    tied: bool
    """Whether one matrix serves both ends, so that the embedding's operator acts before the head as well."""


def plan_attachment(
    model: nn.Module, config: PatConfig, *, known_stream: ResidualStream | None = None
) -> AttachmentPlan:
    """Check an adapter's configuration against a base model and fill in what it leaves open.

    Args:
        model: the base model; untouched unless `known_stream` says that an adapter is on it already.
        config: of the adapter, which keeps it; changed in place where it says "filled in".
        known_stream: map of the base's parameters, if known from an earlier adapter.

    Raises:
        PatError: the family is not supported, the width illegal, an option impossible, or the adapter belongs to
            another base model, or DeepSpeed has taken the weights apart.
    """
    check_not_taken_apart()
    if known_stream is None and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PatError(
            "Got a model with adapter layers already; load the base model again, call unload() on its PeftModel "
            "first, or put a second adapter on that with add_adapter()."
        )
    if not isinstance(model, PreTrainedModel):
        raise PatError(
            f"Got a {type(model).__name__}, which is no transformers model; expected a causal language model such as "
            "AutoModelForCausalLM returns."
        )
    base_config = model.config
    check_kind(base_config.name_or_path or type(model).__name__, base_config)
    family = get_family(base_config.model_type)
    if model.get_output_embeddings() is None:
        raise PatError(
            f"Got a {type(model).__name__}, which has no language-model head; load the checkpoint with "
            "AutoModelForCausalLM."
        )
    shape = check_config(base_config, family, config)
    if known_stream is None:
        check_tie(model, untie=config.untie_word_embeddings)
    stream = known_stream or map_of(model)
    shares_head = stream.head is None
    _check_lora_bias(config, stream)
    _check_saved(config, model, stream)
    tied = shares_head and not config.untie_word_embeddings
    rotation = config.resolved_rotation if config.is_resolved else None
    if rotation is None:  # a new adapter, not a loaded one
        if not next(model.parameters()).is_meta:  # one that is only counted; who counts it says so, or attaches again
            warn_of_idle_options(config, shape, tied=shares_head)
            if shares_head and not tied:
                warn_of_growth(base_config, shape)
        rotation = _resolve_rotation(model, config, stream, shape, tied=tied)
        config.base_shape, config.base_quantization = _shape_of(base_config, family), quantization_of(base_config)
        config.base_fingerprint = base_fingerprint(base_config, base_config.name_or_path, revision=config.revision)
        cut = [axis.field for axis in AXES.values() if axis.name == "hidden" or shape.cuts(axis.name)]
        config.resolved_width = {field: shape.pruned_sizes[field] for field in cut}
        config.resolved_rotation = rotation
    else:
        warn_of_another_base(config, base_config)
    group_width = head_dim(model) * base_config.num_attention_heads // shape.size("heads")
    return AttachmentPlan(stream, shape, group_width, rotation, tied)


def check_config(base_config: Any, family: Family, config: PatConfig) -> Shape:
    """Check what a base model's configuration alone can tell, without its weights, and return the shape it comes to.

    Raises:
        PatError: a size or the operator rank is illegal, an option impossible, or the adapter belongs to another model.
    """
    check_quantization(base_config)
    if config.is_resolved:
        _check_base_shape(config, _shape_of(base_config, family))
    shape = _shape(base_config, family, config)
    check_rank(shape.size("hidden"), config.operator_rank)
    _check_ends(config, family, tied=bool(base_config.tie_word_embeddings) and not config.untie_word_embeddings)
    _check_rope(base_config, family, shape)
    if config.rotation == "pca" and not shape.cuts("hidden"):
        raise PatError(
            "Got rotation='pca', but the hidden size is not cut; use rotation='auto', or axes with 'hidden'."
        )
    if config.rotation == "pca" and family.has_post_norms:
        raise PatError(f"Got rotation='pca', but {_post_norm_obstacle(family)}; use rotation='auto' or 'none'.")
    return shape


def _shape(base_config: Any, family: Family, config: PatConfig) -> Shape:
    """Take the sizes on record, or choose them."""
    if config.is_resolved and config.resolved_width is not None:
        sizes = sizes_of(base_config, family)
        # Nothing that needs a share of the parameters is asked of a made adapter.
        return Shape(sizes, sizes | config.resolved_width, math.nan, "chosen when the adapter was made")
    base = prunable(empty_model(base_config))
    choose = partial(choose_shape, base, axes=config.axes, asked=asked_sizes(config), multiple_of=config.multiple_of)
    ratio = ratio_of_target(config, base_config, base, lambda share: choose(pruning_ratio=share))
    return choose(pruning_ratio=config.pruning_ratio if ratio is None else ratio)


def default_targets(config: PatConfig, model: nn.Module, stream: ResidualStream) -> PatConfig:
    """Fill in LoRA's targets if none are given: every linear layer on the stream, and expert parameters."""
    if config.target_modules is None:
        linears = [linear for branch in stream.branches for linear in (*branch.readers, branch.writer)]
        paths = {linear.path for linear in linears if linear.path in dict(model.named_modules())}
        targets = {path for path in paths if _is_linear(model.get_submodule(path))}
        config.target_modules = sorted({path.rpartition(".")[2] for path in targets})
        experts = [linear.path for linear in linears if linear.weight == linear.path]
        if experts and config.target_parameters is None:
            if option := _unfit_for_experts(config):
                logger.warning(
                    "LoRA leaves out the expert parameters: peft does not support %s on bare parameters.", option
                )
            else:
                config.target_parameters = list(stream.family.expert_parameters)
    return config


def _unfit_for_experts(config: PatConfig) -> str | None:
    """Return the option, if there is one, with which peft puts no LoRA on bare parameters."""
    names = ["lora_dropout", "lora_bias", "fan_in_fan_out"]
    names += ["use_dora", "use_bdlora", "velora_config", "kasa_config", "monteclora_config"]
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "eva"):
        return f"init_lora_weights={config.init_lora_weights!r}"
    return next((name for name in names if getattr(config, name)), None)


def new_parameters_are_empty() -> bool:
    """Tell whether peft is loading an adapter, and so empties every parameter that a module is given."""
    probe = nn.Module()
    probe.weight = nn.Parameter(torch.empty(1), requires_grad=False)  # draws nothing from the random state
    return probe.weight.is_meta


def _is_linear(module: nn.Module) -> bool:
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear)


def _shape_of(base_config: Any, family: Family) -> dict[str, Any]:
    fields = (family.hidden_size_field, "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {"model_type": family.model_type} | {name: getattr(base_config, name, None) for name in fields}


def _check_base_shape(config: PatConfig, shape: dict[str, Any]) -> None:
    made_for = config.base_shape or shape
    differing = [name for name in shape if made_for.get(name) != shape[name]]
    if differing:
        got = ", ".join(f"{name}={shape[name]}" for name in differing)
        expected = ", ".join(f"{name}={made_for.get(name)}" for name in differing)
        resized = differing == ["vocab_size"]
        raise PatError(
            f"The adapter does not fit this base model: got {got}; the adapter was made for {expected}. "
            + ("If the embedding was resized, save the resized base and take that. " if resized else "")
            + "A new adapter needs a PatConfig of its own, not that of a made one."
        )


def _check_ends(config: PatConfig, family: Family, *, tied: bool) -> None:
    """Refuse LoRA on the head, and adapters that would break a tie that is to be kept."""
    if config.target_modules is not None and check_target_module_exists(config, family.head):
        raise PatError(
            f"Got LoRA on {family.head!r}, which PAT does not support; leave it out of target_modules, or train it "
            f"as a whole with modules_to_save=['{family.head}'] (untied models)."
        )
    if not tied:
        return
    embedding = family.embedding
    saved = {name.rpartition(".")[2] for name in config.modules_to_save or ()}
    ends = {embedding.rpartition(".")[2], family.head}
    adapted = config.target_modules is not None and check_target_module_exists(config, embedding)
    if adapted or (saved & ends and not config.ensure_weight_tying):
        raise PatError(
            "Got an adapter on the embedding or the head of a model that ties them, which would break the tie; set "
            "untie_word_embeddings=True to give the head a matrix of its own"
            + ("." if adapted else ", or ensure_weight_tying=True to train both as one.")
        )


def _check_lora_bias(config: PatConfig, stream: ResidualStream) -> None:
    """Refuse a trained bias where the model has none to merge it into; found after training it would be too late."""
    if not config.lora_bias:
        return
    targets_all = config.target_modules is None or config.target_modules == "all-linear"
    for branch in stream.branches:
        for linear in (*branch.readers, branch.writer):
            is_module = linear.weight != linear.path
            if is_module and linear.bias is None and (targets_all or check_target_module_exists(config, linear.path)):
                raise PatError(
                    f"Got lora_bias=True, but {linear.path} has no bias in this model to merge a trained one into; "
                    "leave lora_bias out, or name layers with a bias in target_modules."
                )


def _check_saved(config: PatConfig, model: nn.Module, stream: ResidualStream) -> None:
    """Refuse `modules_to_save` that name nothing, which peft passes over, and those that hold pruned matrices.

    Peft would copy these while the gates act on the original. It takes every module whose path ends with a name.
    """
    paths = [path for path, _ in model.named_modules()]
    for name in config.modules_to_save or ():
        if not any(path.endswith(name) for path in paths):
            raise PatError(f"Got modules_to_save with {name!r}, but the model has no module of that name.")
        for branch in stream.branches:
            for linear in (*branch.readers, branch.writer):
                steps = linear.path.split(".")
                if any(".".join(steps[:n]).endswith(name) for n in range(1, len(steps))):
                    raise PatError(
                        f"Got modules_to_save with {name!r}, which holds {linear.path}, and PAT acts in it; name the "
                        f"modules inside that are to be trained as a whole, such as {linear.path.rpartition('.')[2]!r}."
                    )


def _check_rope(base_config: Any, family: Family, shape: Shape) -> None:
    rope_type = (getattr(base_config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in family.unloadable_rope and (shape.cuts("hidden") or shape.cuts("heads")):
        narrower = f"at hidden size {shape.pruned('hidden')}" if shape.cuts("hidden") else "with fewer heads"
        raise PatError(
            f"Got a {family.model_type} model with {rope_type}, whose configuration transformers cannot load "
            f"{narrower}; use a variant with the default rope (such as the 4k one), or cut other axes (axes=['mlp'])."
        )


def _resolve_rotation(model: nn.Module, config: PatConfig, stream: ResidualStream, shape: Shape, *, tied: bool) -> str:
    """Decide between PCA and no rotation: it is for a cut of the stream, and not exact everywhere (docs/adr/0004)."""
    if config.rotation == "none" or not shape.cuts("hidden"):
        return "none"
    obstacle = _rotation_obstacle(model, config, stream, shape, tied=tied)
    if obstacle is None:
        return "pca"
    if config.rotation == "pca":
        raise PatError(f"Got rotation='pca', but {obstacle}; use rotation='auto' or 'none'.")
    return "none"


def _post_norm_obstacle(family: Family) -> str:
    return f"{family.model_type} has norms between its writers and the residual add, so no rotation is exact"


def _rotation_obstacle(
    model: nn.Module, config: PatConfig, stream: ResidualStream, shape: Shape, *, tied: bool
) -> str | None:
    family = stream.family
    if family.has_post_norms:
        return _post_norm_obstacle(family)
    if not tied:
        return None
    if family.final_norm.rpartition(".")[2] in {name.rpartition(".")[2] for name in config.modules_to_save or ()}:
        return "the final norm of a tied model is trained (modules_to_save), so its gain will not stay equal in a block"
    gain = model.get_parameter(f"{family.final_norm}.weight").detach().float() + family.gain_offset
    if gain.device == torch.device("meta"):
        return None
    num_pinned = int((~gain_block(gain, config.gain_tolerance)).sum())
    if num_pinned >= shape.pruned("hidden"):
        return (
            f"{num_pinned} of {shape.size('hidden')} channels of this tied model have a final gain too far from its "
            f"median to be rotated (gain_tolerance={config.gain_tolerance}), and only {shape.pruned('hidden')} "
            "channels are to be kept"
        )
    return None
