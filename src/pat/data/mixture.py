"""Several sources in one epoch: how many examples each gives, and in what order they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from datasets import Dataset, concatenate_datasets

from pat.errors import PatError

MAX_TIMES = 1000
"""How often an example may come in one epoch; beyond it a weight is a mistake."""

MAX_EXAMPLES = 50_000_000
"""Examples of one epoch, whose order takes some 24 bytes each."""

Indices = npt.NDArray[np.int64]


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights that sum to 1."""
    return [weight / sum(weights) for weight in weights]


def apportioned(number: int, weights: Sequence[float]) -> list[int]:
    """Divide a number as weights say, into whole numbers that sum to it: the largest remainders are rounded up."""
    exact = [number * share for share in shares(weights)]
    whole = [int(part) for part in exact]
    behind = sorted(range(len(exact)), key=lambda place: (whole[place] - exact[place], place))
    for place in behind[: number - sum(whole)]:
        whole[place] += 1
    return whole


def quotas(names: Sequence[str], lengths: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Return how many examples of each source an epoch has.

    Without weights that is each of them once. With weights it is the fewest by which every example comes and each
    source has its share: the source that has the most for its weight gives each of its examples once, and those of the
    others come again.

    Args:
        names: of the sources.
        lengths: numbers of examples that they have.
        weights: of the sources.

    Raises:
        PatError: an example would come more than `MAX_TIMES` times, or an epoch have more than `MAX_EXAMPLES`.
    """
    if weights is None:
        return list(lengths)
    wanted = shares(weights)
    total = max(length / share for length, share in zip(lengths, wanted, strict=True))
    counts = [max(length, round(share * total)) for length, share in zip(lengths, wanted, strict=True)]
    for name, length, num in zip(names, lengths, counts, strict=True):
        if num > MAX_TIMES * length:
            raise PatError(
                f"Got dataset_weights by which each of the {length:,} examples of {name} comes {num // length:,} times "
                f"in an epoch; expected at most {MAX_TIMES:,}: give it a smaller weight, or more rows."
            )
    if sum(counts) > max(MAX_EXAMPLES, sum(lengths)):
        raise PatError(
            f"Got dataset_weights by which an epoch has {sum(counts):,} examples, of {sum(lengths):,} that there are; "
            f"expected at most {MAX_EXAMPLES:,}: choose weights nearer to the numbers of rows, or use --streaming true."
        )
    return counts


def drawn(length: int, quota: int, rng: np.random.Generator) -> Indices:
    """Return the indices of a source's examples in an epoch: all of them as often as that goes, and some once more."""
    passes, rest = divmod(quota, length)
    return np.concatenate([np.tile(np.arange(length), passes), np.sort(rng.permutation(length)[:rest])])


def mixed(sources: Sequence[Dataset], draws: Sequence[Indices], rng: np.random.Generator) -> Dataset:
    """Return the examples of one epoch of several sources, in a random order."""
    starts = np.cumsum([0, *(len(source) for source in sources)])
    order = np.concatenate([start + indices for start, indices in zip(starts, draws, strict=False)])
    return concatenate_datasets(list(sources)).select(rng.permutation(order))
