"""SliceGPT (Ashkboos et al., 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns").

RMSNorm commutes with a rotation once its gain is folded into what reads it. So the residual stream is given another
basis before each block, that of the principal components of what the block reads there, and its last directions are
deleted: of writers their rows, of readers their columns. Where the stream passes from the basis Q_p to the next one,
the skip connection needs a shortcut matrix Q_pᵀ Q_{p+1}, two in each layer, which the model keeps and which count.

The stream's points p are: the embedding (0), after attention (odd) and after the MLP (even) of each layer. With the
state x_p in d' dimensions and the branch's full output y,

    x_{p+1} = S_pᵀ x_p + Q_{p+1}ᵀ y,    S_p = Q_pᵀ Q_{p+1},    readers W diag(g) Q_p sqrt(d/d'),    eps d/d'

and Q_{p+1} is found from the states that the model sliced so far really has, Q_p x_p + y, in float64. As in section 3.3
the second moment is that of the normalised states, every token weighing the same.

Where we differ from the paper:

- One width d' for all points, chosen by the total number of parameters, shortcuts and an untied head included, and not
  rounded to a multiple of 8. Embedding and head are sliced along with the blocks, the head with the basis of the last
  point. Tied models are untied, because the two ends have different bases, which costs small models much of the cut.
- The result is the base's own transformers model with its decoder layers replaced; attention and MLP are stock ones.

Post-norm families (Gemma 2/3, OLMo 2) are refused: there a gain and a norm over all channels stand between writer and
skip connection, so writers cannot be sliced. So are stacked experts, for simplicity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pat.errors import PatError
from pat.families import Branch, Family, get_family
from pat.surgery.precision import to_float64

from .budget import nearest, num_parameters
from .calibration import batched
from .working_copy import float32_copy, set_dtype

BATCH_SIZE = 4
"""Sequences whose states are computed together."""


class SlicedLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer whose residual stream changes its basis twice."""

    def __init__(self, layer: nn.Module, width: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=eps, elementwise_affine=False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps, elementwise_affine=False)
        self.self_attn = layer.get_submodule("self_attn")
        self.mlp = layer.get_submodule("mlp")
        self.attention_shortcut = _shortcut(width)
        self.mlp_shortcut = _shortcut(width)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map states `(B, T, d')` of one even point to the next; keyword arguments are the attention's."""
        written = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = self.attention_shortcut(hidden_states) + written
        written = self.mlp(self.post_attention_layernorm(hidden_states))
        return cast(Tensor, self.mlp_shortcut(hidden_states) + written)


@dataclass
class _Slicing:
    """One run over the stream: its current basis, and the calibration states in it."""

    width: int
    gain: float
    """sqrt(d/d'), which norms over fewer channels lack; folded into the readers."""
    eps: float
    """Epsilon of the base's norms."""
    basis: Tensor
    """Q_p, `(d, d')`, float64."""
    states: list[Tensor]
    """x_p of every batch, each `(B, T, d')`, float32."""

    def rebase(self, full: list[Tensor]) -> Tensor:
        """Find the basis of the next point from its states `(B, T, d)`, move there, and return Q_pᵀ Q_{p+1}."""
        before = self.basis
        self.basis = principal_components(full, self.width, self.eps)
        self.states = [(to_float64(states) @ self.basis).float() for states in full]
        return before.mT @ self.basis

    def full(self, states: Tensor) -> Tensor:
        """Return states `(…, d')` in the stream's own coordinates `(…, d)`, float64."""
        return to_float64(states) @ self.basis.mT

    def slice_reader(self, reader: nn.Linear, norm_gain: Tensor) -> None:
        _set_weight(reader, to_float64(reader.weight.detach()) * norm_gain @ self.basis * self.gain)

    def slice_writer(self, writer: nn.Linear, multiplier: float) -> None:
        _set_weight(writer, multiplier * self.basis.mT @ to_float64(writer.weight.detach()))
        if writer.bias is not None:
            bias = multiplier * to_float64(writer.bias.detach()) @ self.basis
            writer.bias = nn.Parameter(bias.to(writer.bias))


@torch.no_grad()
def slice_model(model: PreTrainedModel, calibration: Sequence[Tensor], *, width: int) -> PreTrainedModel:
    """Return a copy of a model with every point of its residual stream sliced to `width`, the base unchanged.

    Its shortcut matrices are frozen. It runs, caches and trains like the base, but its configuration still has the
    base's sizes: what `save_pretrained` writes of it cannot be loaded.

    Args:
        model: a dense base model without adapters.
        calibration: token sequences, each `(T,)`.
        width: d', from 1 to d; at d nothing is deleted and the function is the base's up to rounding.

    Raises:
        PatError: the family cannot be sliced (post-norms, experts), the width is out of range, or no calibration text.
    """
    family = check_sliceable(get_family(model.config.model_type))
    hidden_size = getattr(model.config, family.hidden_size_field)
    if not 1 <= width <= hidden_size:
        raise PatError(f"Got a width of {width} for SliceGPT; expected 1 to the hidden size {hidden_size}.")
    work = float32_copy(model)
    batches = [batch.to(model.device) for batch in batched(calibration, BATCH_SIZE)]
    embedded, arguments = zip(*(_layer_inputs(work, family, batch) for batch in batches), strict=True)

    _untie(work, family)
    eps = getattr(model.config, family.eps_field)
    basis = principal_components(embedded, width, eps)
    gain = math.sqrt(hidden_size / width)
    slicing = _Slicing(width, gain, eps, basis, [(to_float64(states) @ basis).float() for states in embedded])
    embedding = cast(nn.Embedding, work.get_submodule(family.embedding))
    _set_weight(embedding, to_float64(embedding.weight.detach()) @ basis)

    layers = cast(nn.ModuleList, work.get_submodule(family.layers))
    for index in range(len(layers)):
        layers[index] = _slice_layer(layers[index], slicing, family, [each[index] for each in arguments])

    slicing.slice_reader(_linear(work, family.head), _gain(work, family.final_norm, family))
    work.set_submodule(family.final_norm, nn.RMSNorm(width, eps=eps * hidden_size / width, elementwise_affine=False))
    set_dtype(work, model.dtype)
    return work


def sliced_parameters(model: PreTrainedModel, width: int) -> int:
    """Return the size of `slice_model`'s result, without making it."""
    family = get_family(model.config.model_type)
    hidden_size = getattr(model.config, family.hidden_size_field)
    untied = num_parameters(model)
    if model.config.tie_word_embeddings:
        untied += model.get_parameter(f"{family.embedding}.weight").numel()
    num_layers = model.config.num_hidden_layers
    norms = (2 * num_layers + 1) * hidden_size
    q_k_norms = sum(
        model.get_parameter(f"{family.layers}.{index}.{norm}.weight").numel()
        for index in range(num_layers)
        for norm in family.qk_norm
    )
    of_readers = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and not name.endswith(_writers(family, ".bias"))
    )
    # Everything else has one axis along the residual stream.
    along = (untied - norms - q_k_norms - of_readers) // hidden_size
    return int(along * width + q_k_norms + of_readers + 2 * num_layers * width * width)


def choose_sliced_width(model: PreTrainedModel, target_parameters: int) -> int:
    """Return the width whose total number of parameters comes nearest to a target, from 1 to the hidden size."""
    hidden_size = getattr(model.config, get_family(model.config.model_type).hidden_size_field)
    return nearest(range(1, hidden_size + 1), lambda width: sliced_parameters(model, width), target_parameters)


def principal_components(states: Sequence[Tensor], count: int, eps: float) -> Tensor:
    """Return the leading eigenvectors of the second moment of normalised states, `(d, count)`, float64.

    Args:
        states: of every batch, `(B, T, d)`.
        count: d'.
        eps: of the norm.
    """
    width = states[0].shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64)
    for batch in states:
        rows = to_float64(batch).flatten(0, -2)
        rows = rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
        moment += (rows.mT @ rows).cpu()
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :count]
    return to_float64(vectors.to(states[0].device))


def _slice_layer(
    layer: nn.Module, slicing: _Slicing, family: Family, arguments: Sequence[dict[str, Any]]
) -> SlicedLayer:
    """Slice one layer in execution order, each branch on the states that the part before it gives."""
    eps = slicing.eps * slicing.gain**2
    sliced = SlicedLayer(layer, slicing.width, eps).to(slicing.states[0].device)
    multiplier = float(getattr(layer, "residual_multiplier", 1.0))
    branches: list[tuple[Branch, nn.RMSNorm, nn.Linear]] = [
        (family.attention, sliced.input_layernorm, sliced.attention_shortcut),
        (family.feed_forward[-1], sliced.post_attention_layernorm, sliced.mlp_shortcut),
    ]
    for branch, norm, shortcut in branches:
        assert branch.pre_norm is not None, "checked by check_sliceable"
        gain = _gain(layer, branch.pre_norm, family)
        for reader in branch.readers:
            slicing.slice_reader(_linear(layer, reader), gain)
        full = []
        for states, kwargs in zip(slicing.states, arguments, strict=True):
            if branch is family.attention:
                written = sliced.self_attn(hidden_states=norm(states), **kwargs)[0]
            else:
                written = sliced.mlp(norm(states))
            full.append(slicing.full(states) + multiplier * to_float64(written))
        change_of_basis = slicing.rebase(full)
        slicing.slice_writer(_linear(layer, branch.writer), multiplier)
        shortcut.weight.copy_(change_of_basis.mT)
    return sliced


def _layer_inputs(model: PreTrainedModel, family: Family, input_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the first layer's states, and what every layer is passed beside its states: masks and positions."""
    states: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states.extend(args if not states else ())
        arguments.append(kwargs)

    layers = cast(nn.ModuleList, model.get_submodule(family.layers))
    handles = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return states[0], arguments


def check_sliceable(family: Family) -> Family:
    """Return the family, or raise a PatError that says why its residual stream cannot be sliced."""
    branches = (family.attention, *family.feed_forward)
    if family.has_post_norms or any(branch.pre_norm is None for branch in branches):
        problem = "norms the output of its writers, so their rows cannot be deleted"
    elif family.expert_parameters:
        problem = "has stacked experts, which this implementation does not slice"
    else:
        return family
    raise PatError(
        f"SliceGPT cannot slice a model of type {family.model_type!r}: it {problem}. Leave the method out, or use a "
        "pre-norm base such as Llama, Mistral, Qwen 2/3, Gemma 1 or Phi-3."
    )


def _untie(model: PreTrainedModel, family: Family) -> None:
    """Give a copy a head of its own, starting as the embedding's matrix."""
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        head = _linear(model, family.head)
        head.weight = nn.Parameter(model.get_parameter(f"{family.embedding}.weight").detach().clone())
        model.all_tied_weights_keys = {}


def _shortcut(width: int) -> nn.Linear:
    # Without its random initialisation, which would move the caller's random state.
    linear = cast(nn.Linear, skip_init(nn.Linear, width, width, bias=False))
    return linear.requires_grad_(False)


def _gain(module: nn.Module, norm: str, family: Family) -> Tensor:
    return to_float64(module.get_parameter(f"{norm}.weight").detach()) + family.gain_offset


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
    return linear


def _set_weight(module: nn.Linear | nn.Embedding, weight: Tensor) -> None:
    """Replace the weight of a linear map or an embedding by one of another shape, float64, rounding it once."""
    module.weight = nn.Parameter(weight.to(module.weight.dtype).contiguous())
    if isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    else:
        module.out_features, module.in_features = weight.shape


def _writers(family: Family, suffix: str) -> tuple[str, ...]:
    return tuple(branch.writer + suffix for branch in (family.attention, *family.feed_forward))
