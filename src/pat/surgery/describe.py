"""Functions that read off a model what it is: its residual stream, its ends, its head size and its parameters."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pat.errors import PatError
from pat.families import get_family
from pat.loading import empty_model
from pat.surgery.residual import ResidualStream, map_residual_stream, model_tensors


def map_of(model: PreTrainedModel) -> ResidualStream:
    """Return the map of a model's residual stream; the model has no adapter on it.

    Raises:
        PatError: see `map_residual_stream`.
    """
    return map_residual_stream(get_family(model.config.model_type), model_tensors(model), tied=shares_head(model))


def shares_head(model: nn.Module) -> bool:
    """Tell whether one matrix serves a model's embedding and its head, whatever its configuration says."""
    ends: Any = model
    embedding, head = ends.get_input_embeddings().weight, ends.get_output_embeddings().weight
    return embedding is head or (not head.is_meta and embedding.data_ptr() == head.data_ptr())


def check_tie(model: PreTrainedModel, *, untie: bool = False) -> bool:
    """Return what `shares_head` does, after holding the configuration against it.

    Args:
        model: without an adapter on it.
        untie: whether the model is to get a head of its own, so that it does not matter what the configuration says.

    Raises:
        PatError: the configuration says that embedding and head are one matrix, and the weights have two.
    """
    shared = shares_head(model)
    if model.config.tie_word_embeddings and not shared and not untie:
        raise PatError(
            "Got a model whose configuration says tie_word_embeddings=true, but whose weights hold a head that is not "
            "the embedding; set tie_word_embeddings to false in its config.json, or tune with "
            "untie_word_embeddings=True."
        )
    return shared


def head_dim(model: nn.Module) -> int:
    """Return the size of one attention head."""
    base: Any = model
    attention = base.get_submodule(f"{get_family(base.config.model_type).layers}.0.self_attn")
    return int(cast(int, attention.head_dim))


def count_parameters(config: PretrainedConfig, *, tied: bool | None = None) -> int:
    """Count the parameters of the model a configuration describes; shared ones count once.

    Args:
        config: of the model.
        tied: whether one matrix serves embedding and head, where there is a model to see it in; by default what the
            configuration says.
    """
    if tied is not None:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = tied
    return sum(parameter.numel() for parameter in empty_model(config).parameters())
