"""Memory for tuning: what is exact (base, adapter, optimizer) and an estimate of the activations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from peft import PeftConfig, get_peft_model

from pat.surgery.costs import Skeleton

ADAM_BYTES = 8
"""Bytes per trainable parameter: two float32 moments."""

GRADIENT_BYTES = 4
"""Bytes per trainable parameter: adapters are float32 whatever the base is."""

HALF_PRECISION_BYTES = 3
"""Bytes per activation of a half-precision base: norms, masks and the inputs of adapters are kept in float32."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device while `pat tune` trains, by what they are for."""

    batch_size: int
    length: int
    """Number of tokens in each row of a batch."""
    num_trainable_parameters: int
    base_bytes: int
    adapter_bytes: int
    """Bytes of LoRA, operators, mask, gates, rotation and refit."""
    optimizer_bytes: int
    """Bytes of gradients and Adam's moments."""
    activation_bytes: int
    """Estimate without gradient checkpointing."""
    checkpointed_activation_bytes: int
    """Estimate with gradient checkpointing."""
    total_bytes: int
    """Everything, without gradient checkpointing."""
    checkpointed_total_bytes: int
    """Everything, with gradient checkpointing."""


def training_memory(skeleton: Skeleton, config: PeftConfig, *, batch_size: int, length: int) -> TrainingMemory:
    """Attach the adapter to the skeleton, count it, and estimate the rest.

    Args:
        skeleton: the base model; carries the adapter afterwards.
        config: the adapter's configuration: PAT's, or that of LoRA on a small model.
        batch_size: number of rows in a forward pass.
        length: number of tokens in a row.

    Raises:
        PatError: the adapter does not go with the model.
    """
    layer_bytes, kept_bytes = _layer_activations(skeleton, batch_size * length)
    num_layers = int(skeleton.model.config.num_hidden_layers)
    base = {id(tensor): tensor for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers())}
    base_bytes = _num_bytes(list(skeleton.model.parameters()))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(skeleton.model, config)
    adapter_bytes = _num_bytes([t for t in (*model.parameters(), *model.buffers()) if id(t) not in base])
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer_bytes = num_trainable * (GRADIENT_BYTES + ADAM_BYTES)
    activation_bytes = num_layers * layer_bytes
    checkpointed_bytes = num_layers * kept_bytes + layer_bytes
    exact_bytes = base_bytes + adapter_bytes + optimizer_bytes
    return TrainingMemory(
        batch_size=batch_size,
        length=length,
        num_trainable_parameters=num_trainable,
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        optimizer_bytes=optimizer_bytes,
        activation_bytes=activation_bytes,
        checkpointed_activation_bytes=checkpointed_bytes,
        total_bytes=exact_bytes + activation_bytes,
        checkpointed_total_bytes=exact_bytes + checkpointed_bytes,
    )


def _num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _layer_activations(skeleton: Skeleton, num_tokens: int) -> tuple[int, int]:
    """Return the bytes a layer saves for its backward pass, and those it saves with gradient checkpointing.

    Values per token: 4 d for each norm with the operator beside it, 2 for each channel of the queries and of the keys
    (of which there are as many in the attention's output and in the values), 4 for each channel of the MLP. LoRA on
    expert parameters also makes a copy of the layer's experts. The estimate lies within 15 % of what autograd was seen
    to save in float32, and within 25 % in bfloat16 autocast.
    """
    stream, shapes = skeleton.stream, skeleton.shapes()
    attention, feed_forward = stream.branches[:2]
    hidden_size = shapes[f"{stream.final_norm}.weight"].numel()
    num_norms = sum(norm is not None for b in (attention, feed_forward) for norm in (b.pre_norm, b.post_norm))
    query_width, key_width = skeleton.attention_widths()
    writer, element = shapes[feed_forward.writer.weight], skeleton.dtype.itemsize
    mlp_width = writer[-1] * (skeleton.model.config.num_experts_per_tok if len(writer) == 3 else 1)
    values = 4 * hidden_size * num_norms + 2 * (query_width + key_width) + 4 * mlp_width
    experts = sum(
        shapes[linear.weight].numel() * element
        for linear in (*feed_forward.readers, feed_forward.writer)
        if linear.weight == linear.path
    )
    saved_bytes = HALF_PRECISION_BYTES if element == 2 else element
    return num_tokens * values * saved_bytes + experts, num_tokens * hidden_size * element
