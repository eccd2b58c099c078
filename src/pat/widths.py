"""Which hidden sizes a pruned model may have, and which sizes run well along any axis.

Of hidden sizes one constraint is hard, because a checkpoint that breaks it cannot be loaded: the hidden size must be a
multiple of the number of attention heads (transformers validates it for Llama, Gemma 2/3 and many others even when
`head_dim` is explicit; docs/adr/0006). Alignment to tensor-core tiles and quantised rows is a preference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pat.errors import PatError

ALIGNMENTS = (256, 128, 64, 32, 16, 8)
"""Preferred divisors, best first: K-quants, Marlin int4, tensor cores, Q4_0 rows, SIMD."""

ALIGNMENT_SLACK = 0.03
"""Distance at which a better aligned size may lie, relative to the one asked for."""


@dataclass(frozen=True)
class Width:
    """A hidden size chosen for the pruned model, and why."""

    hidden_size: int
    pruned_hidden_size: int
    reason: str

    @property
    def pruning_ratio(self) -> float:
        """Share of the hidden size that is cut, in (0, 1)."""
        return 1 - self.pruned_hidden_size / self.hidden_size


def choose_width(
    hidden_size: int,
    num_attention_heads: int,
    *,
    pruning_ratio: float | None = None,
    pruned_hidden_size: int | None = None,
    multiple_of: int | None = None,
) -> Width:
    """Choose the legal hidden size nearest to what was asked for.

    Args:
        hidden_size: width of the base model, in channels.
        num_attention_heads: number of query heads; divides every loadable width.
        pruning_ratio: share of channels to cut, in (0, 1).
        pruned_hidden_size: an exact width instead of a ratio; taken as it is or refused.
        multiple_of: a hard alignment on top of the number of heads.

    Raises:
        PatError: the width is illegal or not smaller than the base's.
    """
    legal = legal_widths(hidden_size, num_attention_heads, multiple_of=multiple_of)
    if pruned_hidden_size is not None:
        return _check_explicit(hidden_size, num_attention_heads, pruned_hidden_size, multiple_of, legal)

    assert pruning_ratio is not None, "a width or a ratio"
    asked = hidden_size * (1 - pruning_ratio)
    near = [width for width in legal if abs(width - asked) <= ALIGNMENT_SLACK * asked]
    candidates = near or [min(legal, key=lambda width: (abs(width - asked), width))]
    chosen = min(candidates, key=lambda width: (-alignment(width), abs(width - asked), width))
    why = f"cutting {pruning_ratio:.4g} of {hidden_size} leaves {asked:g}; multiples of {legal.step} can be loaded"
    if near:
        lie = "1 lies" if len(near) == 1 else f"{len(near)} lie"
        why += f", {lie} within {ALIGNMENT_SLACK:.0%}, the best aligned is a multiple of {alignment(chosen)}"
    else:
        why += f", none lies within {ALIGNMENT_SLACK:.0%}, this is the nearest"
    return Width(hidden_size, chosen, why)


def legal_widths(hidden_size: int, num_attention_heads: int, *, multiple_of: int | None = None) -> range:
    """Return every hidden size below the base's that can be loaded, ascending.

    Raises:
        PatError: `multiple_of` leaves no width.
    """
    step = math.lcm(num_attention_heads, multiple_of or 1)
    legal = range(step, hidden_size, step)
    if not legal:
        raise PatError(
            f"No width smaller than hidden_size={hidden_size} is a multiple of {step} "
            f"(num_attention_heads={num_attention_heads}, multiple_of={multiple_of}); lower multiple_of."
        )
    return legal


def _check_explicit(
    hidden_size: int, num_attention_heads: int, width: int, multiple_of: int | None, legal: range
) -> Width:
    if width in legal:
        return Width(hidden_size, width, "asked for explicitly")
    below = max((w for w in legal if w < width), default=None)
    above = min((w for w in legal if w > width), default=None)
    nearest = " and ".join(str(w) for w in (below, above) if w is not None)
    if width >= hidden_size:
        problem = f"it must be smaller than the base model's hidden size {hidden_size}"
    elif width < 1:
        problem = "it must be positive"
    elif width % num_attention_heads:
        problem = f"it must be a multiple of num_attention_heads={num_attention_heads} to be loadable by transformers"
    else:
        problem = f"it must be a positive multiple of multiple_of={multiple_of}"
    raise PatError(f"Got pruned_hidden_size={width}, but {problem}; nearest legal: {nearest}.")


def alignment(width: int) -> int:
    """Return the largest preferred divisor of `width`, 1 if there is none."""
    return next((a for a in ALIGNMENTS if width % a == 0), 1)


def nearest_aligned(asked: float, size: int, step: int) -> int:
    """Return the best aligned multiple of `step` below `size` that lies shortly below `asked`, or the nearest one.

    Not above it: a share to cut is cut at least. A quarter of SmolLM2-135M would otherwise leave 896 MLP channels,
    which is 24.7 % of the parameters and 18.9 % of its Q4_K_M file; 864 are 25.9 and 20.1 % (docs/adr/0024).
    """
    if step > size:
        raise PatError(f"Got multiple_of={step}; expected at most the number of channels of an MLP, {size}.")
    near = [n for n in range(step, size, step) if 0 <= asked - n <= ALIGNMENT_SLACK * asked]
    candidates = near or [min(range(step, size + 1, step), key=lambda n: abs(n - asked))]
    return min(candidates, key=lambda n: (-alignment(n), abs(n - asked), n))
