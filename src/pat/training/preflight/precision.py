"""Choose the arithmetic of training on a CPU: float32, or bf16 autocast where a measurement shows that it pays."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import nn

LEAST_HIDDEN_SIZE = 256
"""Narrower models lose more to the casts than they gain in their products, so nothing is measured for them."""

LEAST_GAIN = 1.2
"""Speed-up from which on autocast is taken. Processors with bf16 instructions gain 1.5 to 2 times, the others lose most
of their speed, so that the choice does not depend on the noise of the measurement."""

_LARGEST = (1024, 4096)
"""Sizes beyond which the answer no longer changes, and only takes longer."""

_NUM_TOKENS = 512
_ROUNDS = 8


@cache
def bf16_pays_on_cpu(hidden_size: int, intermediate_size: int) -> bool:
    """Tell whether one training step of a linear layer runs faster under bf16 autocast than in float32 on this CPU.

    Args:
        hidden_size: number of input features of the layer.
        intermediate_size: number of its output features.

    Returns:
        Whether the fastest of a few interleaved rounds, in processor time so that other jobs do not decide, is at least
        `LEAST_GAIN` times as fast; takes about a second.
    """
    if hidden_size < LEAST_HIDDEN_SIZE:
        return False
    hidden_size, intermediate_size = min(hidden_size, _LARGEST[0]), min(intermediate_size, _LARGEST[1])
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    layer = nn.Linear(hidden_size, intermediate_size, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    layer.requires_grad_(False)
    tokens = torch.randn(_NUM_TOKENS, hidden_size, generator=generator).requires_grad_()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where cores are busy, which says nothing of bf16
    try:
        for round_index in range(_ROUNDS + 1):
            for enabled, found in seconds.items():
                started = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    product = layer(tokens)
                product.sum().backward()
                if round_index:  # the first round compiles kernels
                    found.append(time.process_time() - started)
    finally:
        torch.set_num_threads(num_threads)
    return min(seconds[False]) >= LEAST_GAIN * min(seconds[True])
