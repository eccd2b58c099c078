"""Memory of each process when a training is sharded over GPUs (FSDP2): on paper, from counts."""

from __future__ import annotations

from dataclasses import dataclass

from pat.tuner.memory import ADAM_BYTES, GRADIENT_BYTES, TrainingMemory

WEIGHT_BYTES = 4
"""Bytes per trainable parameter: adapters are float32 whatever the base is."""

LAYERS_AT_ONCE = 2
"""Layers that are whole at a time: the one that is computed, and the next one, which is being gathered."""


@dataclass(frozen=True)
class ShardedMemory:
    """Bytes of each GPU, and of a machine's memory, while `pat tune` trains with FSDP2."""

    num_nodes: int
    gpus_per_node: int
    base_share_bytes: int
    """A GPU's share of the frozen base."""
    adapter_share_bytes: int
    """Its share of LoRA, operators and gates, with their gradients and Adam's moments."""
    replicated_bytes: int
    """What every GPU has whole: rotation, orders of the channels, what fills in for MLP channels."""
    gathered_bytes: int
    """Layers that are whole for a moment, with their part of the adapter, and the embeddings and head."""
    activation_bytes: int
    """Estimate, with gradient checkpointing."""
    gpu_bytes: int
    """Everything: the peak of a GPU, in stage one, in the backward pass."""
    host_load_bytes: int
    """Memory of a machine while the base is loaded: every process reads it whole before it keeps its share."""
    host_cut_bytes: int
    """Memory of the first machine at the milestone, where the first process cuts: the base, its adapter, the small
    model."""


def sharded_memory(
    memory: TrainingMemory,
    *,
    nodes: int,
    gpus: int,
    num_layers: int,
    outside_bytes: int,
    small_bytes: int,
) -> ShardedMemory:
    """Divide the memory of a training in one process over GPUs.

    Args:
        memory: of one process.
        nodes: number of machines.
        gpus: number of GPUs of each.
        num_layers: of the model.
        outside_bytes: bytes of the weights outside of the layers: embeddings and head.
        small_bytes: bytes of the small model.
    """
    processes = nodes * gpus
    trained = memory.num_trainable_parameters * (WEIGHT_BYTES + GRADIENT_BYTES + ADAM_BYTES)
    weights = memory.num_trainable_parameters * WEIGHT_BYTES
    replicated = memory.adapter_bytes - weights
    layer = (memory.base_bytes - outside_bytes + weights) // num_layers
    # A layer's gradients are whole until they are reduced.
    gradients = memory.num_trainable_parameters * GRADIENT_BYTES // num_layers
    gathered = LAYERS_AT_ONCE * layer + gradients + outside_bytes
    shares = memory.base_bytes // processes, trained // processes
    return ShardedMemory(
        num_nodes=nodes,
        gpus_per_node=gpus,
        base_share_bytes=shares[0],
        adapter_share_bytes=shares[1],
        replicated_bytes=replicated,
        gathered_bytes=gathered,
        activation_bytes=memory.checkpointed_activation_bytes,
        gpu_bytes=sum(shares) + replicated + gathered + memory.checkpointed_activation_bytes,
        host_load_bytes=gpus * memory.base_bytes,
        host_cut_bytes=memory.base_bytes + memory.adapter_bytes + small_bytes,
    )
