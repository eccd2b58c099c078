"""How long LoRA takes on this machine's CPU: one layer and the head of the model are timed, without its weights.

The layer is made anew with random weights, so that nothing is loaded; texts are as long as in training. Layer and head
are timed apart, forwards and backwards, and stand for the whole model by their FLOPs.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pat.plan.guide import MILLION, head_flops
from pat.report.progress import phase
from pat.shape import AXES
from pat.surgery.costs import ModelCost, Skeleton, build_skeleton, cost_of
from pat.surgery.dense import shrink_config
from pat.surgery.describe import head_dim
from pat.surgery.layers import droppable_layers, example_layers, layers_of
from pat.training.preflight.precision import bf16_pays_on_cpu
from pat.training.preflight.threads import measure_threads, using
from pat.tuner.config import PatConfig
from pat.tuner.memory import TrainingMemory

SECONDS = 2.0
"""Time for each of the two, but for the last round; the first round, which allocates, does not count."""

LEAST_ROUNDS, MOST_ROUNDS = 2, 20

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much memory a container may take."""


@dataclass(frozen=True)
class CpuTime:
    """Time of a million tokens of training on this machine's CPU, from a layer and the head that were timed."""

    num_threads: int
    """Number of threads of torch, chosen as `pat tune` chooses it where something is timed."""
    memory_bytes: int | None
    """Memory of the machine, or of the container; None where the system does not say."""
    fits: bool
    """Whether base, adapter, optimizer and activations fit into it, in float32, without gradient
    checkpointing; if not, nothing is timed."""
    bf16: bool
    """Whether bf16 autocast pays here, as `pat tune` finds for itself."""
    layer_flops_per_second: float | None
    """FLOPs of a forward pass that come to a second, the backward pass done as well; None where nothing is timed."""
    head_flops_per_second: float | None
    """The same of the head and the loss."""
    base_seconds: float | None
    """Seconds of LoRA on the whole base."""
    small_seconds: tuple[float, ...]
    """Seconds of LoRA on each of the candidates, as after the cut; none where nothing is timed."""


def cpu_time(
    skeleton: Skeleton, base: ModelCost, small: tuple[ModelCost, ...], memory: TrainingMemory, *, shown: bool = True
) -> CpuTime:
    """Time a layer and the head of the base for some seconds, and tell the time of a million tokens from it.

    Args:
        skeleton: the base, without an adapter.
        base: its cost at the length of training.
        small: those of the candidates.
        memory: of training; weights are counted in float32 here, in which they are trained on a CPU.
        shown: whether it is said that this is under way.
    """
    num_bytes, room = memory.total_bytes, _memory_bytes()
    num_bytes += base.total.num_parameters * torch.float32.itemsize - memory.base_bytes
    config = skeleton.model.config
    width = int(getattr(config, skeleton.stream.family.hidden_size_field))
    sizes = width, int(getattr(config, "intermediate_size", None) or width)
    bf16 = bf16_pays_on_cpu(*sizes)
    fits, num_threads = room is None or num_bytes <= room, torch.get_num_threads()
    if not fits:
        return CpuTime(num_threads, room, fits, bf16, None, None, None, ())
    with phase("Timing a layer and the head on this CPU", shown=shown), using(measure_threads(*sizes, bf16=bf16)):
        num_threads = torch.get_num_threads()
        layers, head = _rates(skeleton, memory.length, bf16)

    def seconds(cost: ModelCost) -> float:
        return MILLION * (cost.prefill_flops_per_token / layers + head_flops(cost) / head)

    return CpuTime(num_threads, room, fits, bf16, layers, head, seconds(base), tuple(map(seconds, small)))


def _rates(skeleton: Skeleton, length: int, bf16: bool) -> tuple[float, float]:
    """Return the FLOPs of forward passes a second, of layers and of the head."""
    stream = skeleton.stream
    may_go = sum(droppable_layers(stream))
    keep = example_layers(stream, len(layers_of(stream)) - may_go + 1)  # one, or one beside each of the rarer kinds
    config = shrink_config(
        skeleton.model.config,
        stream.family,
        {AXES["layers"].field: len(keep)},
        head_dim=head_dim(skeleton.model),
        tied=stream.head is None,
        keep_layers=keep,
    )
    cost = cost_of(build_skeleton(config, torch.float32), length)
    ours = PatConfig(task_type="CAUSAL_LM")
    lora = LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, use_rslora=ours.use_rslora, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about experts, which it has named itself
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        states = torch.randn(1, length, model.get_input_embeddings().weight.shape[1])
        labels = torch.randint(model.get_output_embeddings().weight.shape[0], (length,))
        get_peft_model(model, lora)  # in place
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def layers_loss(inputs: Tensor) -> Tensor:
        return cast(Tensor, decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state.float().mean())

    def head_loss(inputs: Tensor) -> Tensor:
        return cross_entropy(head(inputs)[0].float(), labels)

    head_cost = head_flops(cost)
    layers_cost = cost.prefill_flops_per_token - head_cost / length  # which counts for the last token
    rates = ((layers_cost, layers_loss), (head_cost, head_loss))
    found = [length * flops / _seconds(loss, states, bf16) for flops, loss in rates]
    return found[0], found[1]


def _seconds(loss: Callable[[Tensor], Tensor], states: Tensor, bf16: bool) -> float:
    """Return how long a forward and a backward pass take, the median of some rounds."""
    found: list[float] = []
    while len(found) <= LEAST_ROUNDS or (sum(found[1:]) < SECONDS and len(found) <= MOST_ROUNDS):
        inputs = states.clone().requires_grad_()
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(inputs)
        value.backward()
        found.append(time.perf_counter() - started)
    return median(found[1:])


def _memory_bytes() -> int | None:
    """Return the bytes of the machine's memory, or of the container's; None where the system does not say."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return None
    try:
        return min(machine, int(CONTAINER_LIMIT.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return machine
