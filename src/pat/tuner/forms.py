"""The dense form of an adapted model: a configuration, and weights that are computed one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pat.sparsification.operator import Operator
from pat.surgery.dense import shrink_config
from pat.surgery.fold import Channels, HeadPlan, fold_weights
from pat.surgery.precision import lift, to_float64
from pat.surgery.residual import ResidualStream
from pat.tuner.weights import embedding_ratio

if TYPE_CHECKING:
    from pat.tuner.merging import MaskedModel


@dataclass(frozen=True)
class DenseForm:
    """What a dense model is made of."""

    config: PretrainedConfig
    weights: Iterable[tuple[str, Tensor]]
    """Name and value of each parameter, computed when it is asked for."""
    num_weights: int


def masked_form(
    model: MaskedModel, dtype: torch.dtype, *, precision: torch.dtype = torch.float64, rounded: bool = True
) -> DenseForm:
    """Return the small dense form of a masked model (specification, "Exact merge").

    Args:
        model: what to merge; its mask must be 0/1.
        dtype: of the dense model.
        precision: to fold matrices in.
        rounded: hand the weights on in `dtype`, not in `precision`.
    """
    base, stream, mask = model.base, model.stream, model.mask
    tied = stream.head is None and not model.untie
    config = shrink_config(
        base.config,
        stream.family,
        pruned_hidden_size=mask.pruned_hidden_size,
        head_dim=_head_dim(base, stream),
        tied=tied,
    )
    ratio = 1.0
    if stream.family.scaled_embedding:
        ratio = embedding_ratio(base.get_submodule(stream.embedding), mask.pruned_hidden_size, dtype)
    final_gain = None
    if mask.head_factor is not None:
        final_gain = model.final_gain * to_float64(mask.head_factor).to(model.final_gain.device)
    folded_stream = stream.untie() if model.untie and stream.head is None else stream
    weights = fold_weights(
        folded_stream,
        model.parameter,
        Channels.from_mask(mask.keep, mask.basis),
        _Lifted(model.operators, precision),
        HeadPlan(tied=tied, final_gain=final_gain, embedding_ratio=ratio),
        precision=precision,
        dtype=dtype if rounded else None,
    )
    return DenseForm(config, weights, folded_stream.num_parameters)


def adapted_form(base: PreTrainedModel, names: Iterable[str], parameter: Callable[[str], Tensor]) -> DenseForm:
    """Return the dense form of a model with an ordinary LoRA adapter: its own configuration, nothing cut.

    Args:
        base: the adapted model.
        names: of its parameters without adapter.
        parameter: those parameters with LoRA merged in.
    """
    listed = list(names)
    return DenseForm(copy.deepcopy(base.config), ((name, parameter(name)) for name in listed), len(listed))


class _Lifted(Mapping[str, Operator]):
    """Operators in another precision, made when they are asked for: all at once would take as much as a model."""

    def __init__(self, operators: Mapping[str, Operator], precision: torch.dtype) -> None:
        self.operators, self.precision = operators, precision

    def __getitem__(self, site: str) -> Operator:
        twin = copy.deepcopy(self.operators[site]).requires_grad_(False)
        for parameter in cast(nn.Module, twin).parameters():
            parameter.data = lift(parameter.data, self.precision)
        return twin

    def __iter__(self) -> Iterator[str]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)


def _head_dim(base: PreTrainedModel, stream: ResidualStream) -> int:
    attention = base.get_submodule(f"{stream.family.layers}.0.self_attn")
    return int(cast(int, attention.head_dim))
