"""Which examples are trained on: those that have something to learn after the cut."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from pat.data.counts import Counts, Numbers
from pat.data.tokens import Truncation


def kept_of(rows: Dataset, counts: Counts, cut: Truncation) -> Dataset:
    """Leave out what was refused, what has nothing to learn and, as SFTTrainer does, what the cut leaves nothing of."""
    indices = counts.indices[_is_kept(counts, cut)]
    return rows if len(indices) == len(rows) else rows.select(indices)


def lengths_of(counts: Counts, cut: Truncation) -> Numbers:
    """Return the number of tokens of each example that is trained on: the table is not looked through."""
    lengths = counts.num_tokens[_is_kept(counts, cut)]
    return lengths if cut.packing or cut.max_length is None else lengths.clip(max=cut.max_length)


def _is_kept(counts: Counts, cut: Truncation) -> npt.NDArray[np.bool_]:
    """Tell which examples are trained on."""
    cuts = cut.max_length is not None and not cut.packing
    return (counts.num_left if cuts else counts.num_targets) > 0
