"""Calibration text for the methods that need some: equally long token sequences from the training data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compare.tokens import tokenize_examples
from pat.errors import PatError


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, num_sequences: int, length: int, seed: int = 0
) -> list[Tensor]:
    """Return token sequences of shape `(length,)`, int64.

    Rows are drawn without replacement. Each sequence starts where a row starts, as at inference (what a model does with
    its first token is out of the ordinary), and is filled up by the rows that follow; what is past its end is lost.

    Args:
        tokenizer: of the model.
        dataset: rows of `TrainingData.train`.
        num_sequences: how many.
        length: tokens of each.
        seed: decides which rows.

    Raises:
        PatError: there are too few rows.
    """
    sequences: list[Tensor] = []
    ids: list[int] = []
    for example in tokenize_examples(tokenizer, dataset.shuffle(seed=seed), None):
        if len(sequences) == num_sequences:
            break
        ids += example["input_ids"]
        if len(ids) >= length:
            sequences.append(torch.tensor(ids[:length], dtype=torch.long))
            ids = []
    if len(sequences) < num_sequences:
        raise PatError(
            f"Got {len(dataset)} rows, enough for {len(sequences)} calibration sequences of {length} tokens; expected "
            f"{num_sequences}. Pass more rows, or ask for fewer or shorter ones (--calibration_rows, --max_length)."
        )
    return sequences


def batched(calibration: Sequence[Tensor], batch_size: int) -> Iterable[Tensor]:
    """Yield `(B, T)` batches of equally long sequences, in the given order.

    Raises:
        PatError: there is no sequence, or one of fewer than two tokens.
    """
    if not calibration or min(sequence.numel() for sequence in calibration) < 2:
        raise PatError("Calibration needs at least one sequence of two or more tokens; see calibration_sequences.")
    flat = [sequence.reshape(-1) for sequence in calibration]
    start = 0
    while start < len(flat):
        end = start + 1
        while end < len(flat) and end - start < batch_size and len(flat[end]) == len(flat[start]):
            end += 1
        yield torch.stack(flat[start:end])
        start = end


def describe(calibration: Sequence[Tensor]) -> str:
    """Return on how much text a method was calibrated, for a method's description."""
    return f"calibrated on {len(calibration)} sequences, {sum(each.numel() for each in calibration):,} tokens"
