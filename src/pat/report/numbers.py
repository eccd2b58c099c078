"""Numbers as people read them, alike on the terminal and in a report."""

from __future__ import annotations

MISSING = "–"

STANDARD_ERRORS = 2
"""A difference of losses counts as seen beyond so many standard errors; by chance alone one in 20 is as large."""

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_told_apart(difference: float, standard_error: float | None) -> bool:
    """Tell whether a difference of losses is beyond what so few rows leave open; never where its error is not known."""
    return standard_error is not None and abs(difference) > STANDARD_ERRORS * standard_error


def count(number: float | None) -> str:
    """Return a whole number with a comma between thousands."""
    return MISSING if number is None else f"{number:,.0f}"


def size(num_bytes: float | None) -> str:
    """Return a number of bytes in megabytes."""
    return MISSING if num_bytes is None else f"{num_bytes / 1e6:,.1f} MB"


def flops(number: float | None) -> str:
    """Return a number of floating-point operations with a prefix of its unit, as in `2.50 GFLOP`."""
    return MISSING if number is None else scaled(number, "FLOP")


def scaled(amount: float, unit: str) -> str:
    """Return an amount with three digits or more and a prefix of its unit, as in `12.34 GB`."""
    for factor, prefix in _PREFIXES:
        if amount >= factor:
            shown = amount / factor
            return f"{shown:.1f} {prefix}{unit}" if shown >= 100 else f"{shown:.2f} {prefix}{unit}"
    return f"{amount:,.0f} {unit}"


def loss(nll: float | None, standard_error: float | None = None) -> str:
    """Return a loss in nats per token, with its standard error if there is one."""
    text = MISSING if nll is None else f"{nll:.3f}"
    return text if standard_error is None else f"{text} ± {standard_error:.3f}"


def difference(nll: float, standard_error: float | None = None) -> str:
    """Return by how much a loss is above (+) or below (−) another one, with its standard error if there is one."""
    text = f"{nll:+.3f}".replace("-", "−")
    return text if standard_error is None else f"{text} ± {standard_error:.3f}"


def deviation(number: float) -> str:
    """Return how far two figures are apart that ought to be one, as in `1.2e-06`; `0` where they are one."""
    return f"{number:.1e}" if number else "0"


def arithmetic(dtype: str, *, bf16: bool, fp16: bool) -> str:
    """Return what a model is trained in: the number format of its weights, and of its products where that is another.

    Args:
        dtype: of the weights, such as `float32`.
        bf16: whether the trainer runs it under autocast to bfloat16.
        fp16: likewise to float16.
    """
    under = {"bfloat16": bf16, "float16": fp16}
    kinds = {"bfloat16": "bf16", "float16": "fp16"}
    return dtype + "".join(f" under {kinds[name]} autocast" for name, is_on in under.items() if is_on and name != dtype)


def change(before: float, after: float) -> str:
    """Return by how much a quantity has changed, as a share of what it was."""
    return f"{after / before - 1:+.1%}".replace("-", "−").replace("%", " %") if before else MISSING
