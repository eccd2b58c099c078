"""A guide to the cost of a cut: losses that were measured on other models, and training times on GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from pat.surgery.costs import ModelCost
from pat.tuner.memory import TrainingMemory

MODEL_FLOPS_UTILISATION = 0.35
"""Share of a GPU's peak that training is assumed to reach. It was not measured."""

MILLION = 1_000_000


@dataclass(frozen=True)
class MeasuredCut:
    """A cut of MLP channels, as `docs/experiments.md` has it, in nats per token; at a milestone of 0.02, the last at 0.

    Today's default, a milestone of 0, has come out 0.01 lower on stories260K at a quarter, and the same on SmolLM2.
    """

    model: str
    pruning_ratio: float
    """Share of all parameters that was cut, all of them in the MLPs."""
    num_tokens: int
    """Number of tokens of training, prompts included."""
    num_seeds: int
    above_lora: float
    """Held-out loss above that of LoRA on the whole model, with as many trainable parameters and tokens."""
    above_base: float
    """Held-out loss above that of the base, which was not tuned at all; negative if it is below."""


MEASURED_CUTS = (
    MeasuredCut("stories260K", 0.125, 245_226, 3, 0.091, -1.765),
    MeasuredCut("stories260K", 0.25, 245_226, 3, 0.197, -1.659),
    MeasuredCut("stories260K", 0.375, 245_226, 3, 0.299, -1.556),
    MeasuredCut("SmolLM2-135M-Instruct", 0.25, 107_624, 2, 0.640, 0.487),
    MeasuredCut("SmolLM2-135M-Instruct", 0.25, 304_237, 1, 0.573, 0.384),
)

NOT_MEASURED = (
    (
        "SmolLM2-135M-Instruct",
        0.125,
        "a run by itself, 13.6% cut, ended 0.16 nats per token above its base after 31,688 tokens of answers",
    ),
)
"""Cuts, by model and ratio, that a reader would look for here, of which there is no run with LoRA beside it, each with
what is known of it (docs/faq.md)."""


@dataclass(frozen=True)
class Hardware:
    """A GPU by its data sheet."""

    name: str
    tflops: float
    """Dense arithmetic in bfloat16 (T4: float16) with sums in float32, in 10^12 FLOP a second."""
    num_bytes: int
    """Bytes of its memory."""


HARDWARE = (
    Hardware("T4", 65, 16 * 10**9),
    Hardware("RTX 3090", 71, 24 * 10**9),
    Hardware("L4", 121, 24 * 10**9),
    Hardware("RTX 4090", 165, 24 * 10**9),
    Hardware("A100 80GB", 312, 80 * 10**9),
    Hardware("H100", 989, 80 * 10**9),
)


@dataclass(frozen=True)
class TrainingTime:
    """Time of a million tokens of training on one GPU, computed and never measured."""

    hardware: Hardware
    fits: bool
    """Whether base, adapter, optimizer and activations fit beside each other, one way or the other."""
    gradient_checkpointing: bool
    """Whether they do not fit without gradient checkpointing."""
    base_seconds: float
    """Seconds of LoRA on the whole base."""
    small_seconds: tuple[float, ...]
    """Seconds of LoRA on each of the candidates, as after the cut."""


def training_times(base: ModelCost, small: tuple[ModelCost, ...], memory: TrainingMemory) -> tuple[TrainingTime, ...]:
    """Compute the time for a million tokens on each GPU: as much for LoRA's backward pass as for the forward pass.

    The costs are those of texts of the length that the memory was counted for. No gradients are taken of frozen
    weights, so that a backward pass is one product of matrices for each of the forward pass's, where full tuning has
    two; gradient checkpointing adds another forward pass.
    """
    return tuple(_time(hardware, base, small, memory) for hardware in HARDWARE)


def _time(hardware: Hardware, base: ModelCost, small: tuple[ModelCost, ...], memory: TrainingMemory) -> TrainingTime:
    plain = memory.total_bytes <= hardware.num_bytes
    passes = 2 if plain else 3
    per_flop = MILLION * passes / (hardware.tflops * 1e12 * MODEL_FLOPS_UTILISATION)
    return TrainingTime(
        hardware,
        fits=memory.checkpointed_total_bytes <= hardware.num_bytes,
        gradient_checkpointing=not plain,
        base_seconds=_forward_flops(base) * per_flop,
        small_seconds=tuple(_forward_flops(cost) * per_flop for cost in small),
    )


def _forward_flops(cost: ModelCost) -> float:
    """Return the FLOPs of a forward pass per token, with logits for every token."""
    return cost.prefill_flops_per_token + head_flops(cost)


def head_flops(cost: ModelCost) -> float:
    """Return the FLOPs of a token's logits."""
    return 2.0 * cost.groups["embedding" if cost.tied else "head"].num_parameters
