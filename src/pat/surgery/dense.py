"""The small dense model: its configuration, its weights to be folded, and the base model's own class built of both."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pat.errors import PatError, RunFailed, one_line
from pat.families import Family
from pat.report.progress import phase
from pat.shape import AXES
from pat.surgery.layers import cut_layer_fields
from pat.surgery.rope import legacy_rope


@dataclass(frozen=True)
class DenseForm:
    """The parts that a dense model is made of."""

    config: PretrainedConfig
    weights: Iterable[tuple[str, Tensor]]
    """Name and value of each parameter, computed when it is asked for."""
    num_weights: int


CUSTOM_CODE = ("auto_map", "custom_pipelines")
"""Fields that name Python files beside a base. What is written is a class of transformers, and has no such files."""


def shrink_config(
    config: PretrainedConfig,
    family: Family,
    sizes: Mapping[str, int],
    *,
    head_dim: int,
    tied: bool,
    keep_layers: Sequence[int] | None = None,
) -> PretrainedConfig:
    """Return a copy of a base model's configuration for the pruned sizes.

    The epsilon of every norm grows by d/d' (the mean is taken over fewer channels) and `head_dim` becomes explicit,
    because the size of the heads does not change. Query heads go with their key/value heads.

    Args:
        config: of the base model.
        family: its record.
        sizes: the pruned sizes by field; the base's where there is none.
        head_dim: size of a head.
        tied: whether one matrix serves embedding and head.
        keep_layers: numbers of the layers that stay, ascending; by default all.

    Raises:
        PatError: the family's configuration refuses these sizes.
    """
    small = copy.deepcopy(config)
    if keep_layers is not None:
        cut_layer_fields(small, keep_layers)
    for name, size in sizes.items():
        if name == "num_key_value_heads":
            num_groups = getattr(small, name, None) or small.num_attention_heads
            small.num_attention_heads = size * small.num_attention_heads // num_groups
        if name != "num_hidden_layers":  # see above
            setattr(small, family.mlp_field if name == AXES["mlp"].field else name, size)
    pruned_hidden_size = getattr(small, family.hidden_size_field)
    ratio = getattr(config, family.hidden_size_field) / pruned_hidden_size
    setattr(small, family.eps_field, getattr(config, family.eps_field) * ratio)
    small.head_dim = head_dim
    small.tie_word_embeddings = tied
    small.use_cache = True  # trainers switch it off, for training alone
    small.output_attentions = small.output_hidden_states = False  # what a call returns, which is no part of a model
    for name in ("quantization_config", *CUSTOM_CODE):
        if hasattr(small, name):
            delattr(small, name)
    for name, value in legacy_rope(small).items():
        if name != "rope_scaling":  # another name for `rope_parameters` here; see `pat.checkpoint.write.write_config`
            setattr(small, name, value)
    try:
        small.validate()
    except Exception as error:  # transformers raises its own validation classes; the message is what matters
        raise PatError(
            f"transformers refuses a {family.model_type} model of hidden size {pruned_hidden_size} with "
            f"{small.num_attention_heads} attention heads: {one_line(error)}"
        ) from error
    return small


def rounded(name: str, tensor: Tensor, dtype: torch.dtype, *, check_finite: bool = True) -> Tensor:
    """Return a folded weight in the dtype of the dense model.

    Args:
        name: of the weight, for messages.
        tensor: the weight.
        dtype: of the dense model.
        check_finite: check it.

    Raises:
        PatError: `check_finite`, and it is beyond the range of that dtype, infinite, or not a number.
    """
    # Contiguous: folding leaves transposed views, and a kernel rounds those otherwise than what it loads later.
    result = tensor.to(dtype).contiguous()
    if not check_finite or result.numel() == 0 or all(map(torch.isfinite, result.aminmax())):  # both hand on a NaN
        return result
    if dtype == torch.float16 and not result.isnan().any():  # an adapter that is broken makes NaNs, too
        raise PatError(
            f"The folded weight {name} is beyond the range of float16 (65,504); write the model in --dtype bfloat16 or "
            "float32."
        )
    raise PatError(f"Got non-finite values in the folded weight {name}; the adapter is broken.")


def build_dense(
    base: PreTrainedModel,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    check_finite: bool = False,
    num_weights: int | None = None,
) -> PreTrainedModel:
    """Build a model of the base's class from a shrunk configuration and folded weights.

    Args:
        base: gives the class and the generation config.
        config: of the model to build.
        weights: by name, or as pairs that are computed one after the other.
        dtype: of the model.
        check_finite: check every weight.
        num_weights: how many there are, to show a bar over them; None shows none.

    Raises:
        PatError: `check_finite`, and a weight is infinite or not a number.
        RunFailed: a weight is missing, left over, or of the wrong shape.
    """
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    state: dict[str, Tensor] = {}
    with phase("Folding", "tensors", total=num_weights, shown=num_weights is not None) as progress:
        for name, tensor in progress.over(pairs):
            state[name] = rounded(name, tensor, dtype, check_finite=check_finite)
    loaded = type(base).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed in the report below, instead of raised without a name
    )
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise RunFailed(f"The folded weights do not fit {type(base).__name__}: {problems}.")
    if base.generation_config is not None:
        model.generation_config = copy.deepcopy(base.generation_config)
    return model
