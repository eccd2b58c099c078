"""ShortGPT (Men et al., 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect").

Whole layers go, those of least block influence first: one minus the cosine similarity of what a layer gets and what it
gives, the mean over the tokens of the calibration text. All influences are measured once, on the whole model, as in the
paper. As many layers go as come closest to the number of parameters asked for, which with few layers is not close.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from pat.families import get_family
from pat.nll import evaluating
from pat.surgery.dense import build_dense, shrink_config
from pat.surgery.describe import head_dim
from pat.surgery.layers import LayerCut
from pat.surgery.residual import model_tensors

from .budget import nearest, num_parameters
from .calibration import batched

BATCH_SIZE = 4
"""Sequences of one forward pass."""


def shortgpt(
    model: PreTrainedModel, calibration: Sequence[Tensor], *, target_parameters: int
) -> tuple[PreTrainedModel, list[int]]:
    """Return a new model of the same class with fewer layers, and the indices of those that stay.

    Args:
        model: a dense base model without adapters; it stays as it is.
        calibration: token sequences, each `(T,)`.
        target_parameters: size of the result, come to as closely as whole layers allow.

    Raises:
        PatError: there is no calibration text, or transformers refuses so few layers.
    """
    influence = block_influence(model, calibration)
    goes: list[int] = influence.argsort(stable=True).tolist()
    sizes = [num_parameters(layer) for layer in _layers(model)]
    total = num_parameters(model)

    def size(count: int) -> int:
        return total - sum(sizes[index] for index in goes[:count])

    count = nearest(range(len(goes)), size, target_parameters)
    keep = sorted(goes[count:])
    return keep_layers(model, keep), keep


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Sequence[Tensor]) -> Tensor:
    """Return the influence of each layer, `(num_layers,)` in float64."""
    layers = _layers(model)
    similarity = torch.zeros(len(layers), dtype=torch.float64)

    def add(index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).double()
        after = (output[0] if isinstance(output, tuple) else output).double()
        similarity[index] += cosine_similarity(before, after, dim=-1).sum().cpu()

    handles = [layer.register_forward_hook(partial(add, index), with_kwargs=True) for index, layer in enumerate(layers)]
    num_tokens = 0
    try:
        with evaluating(model):
            for batch in batched(calibration, BATCH_SIZE):
                model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
                num_tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    return 1 - similarity / num_tokens


def keep_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Return a new model of the same class with some of the layers, their indices ascending.

    Raises:
        PatError: transformers refuses a configuration of so few layers.
    """
    family, config = get_family(model.config.model_type), model.config
    cut = LayerCut(family.layers, tuple(keep), config.num_hidden_layers)
    weights = {name: tensor.detach().clone() for name, tensor in cut.renamed_keys(model_tensors(model)).items()}
    small = shrink_config(
        config, family, {}, head_dim=head_dim(model), tied=bool(config.tie_word_embeddings), keep_layers=keep
    )
    with torch.random.fork_rng():
        short = build_dense(model, small, weights, model.dtype)
    cast(nn.Module, short).to(model.device)
    return short


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(cast(nn.ModuleList, model.get_submodule(get_family(model.config.model_type).layers)))
