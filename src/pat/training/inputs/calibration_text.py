"""Calibration batches from a text file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat.errors import PatError
from pat.nll import read_text, split_text

BATCH_SIZE = 4
CONTEXT = 512
"""Tokens per calibration sequence: long enough for attention to settle, short enough for any model."""


def read_calibration(path: str) -> str:
    """Return the text of a calibration file.

    Raises:
        PatError: the file is missing, not UTF-8 or blank.
    """
    try:
        return read_text(Path(path))
    except PatError as error:
        raise PatError(f"The calibration text cannot be used: {error}") from error


def calibration_pieces(path: str, tokenizer: Any) -> list[list[int]]:
    """Return the tokens of a calibration file in pieces of at most 512.

    Every piece starts with a beginning-of-sequence token if the tokenizer starts texts with one: models that were
    trained that way (Gemma) have another residual stream without it.

    Raises:
        PatError: see `read_calibration`; or there is no tokenizer, or it makes no token of the text.
    """
    text = read_calibration(path)
    if tokenizer is None:
        raise PatError("Got a calibration text but no tokenizer; pass processing_class to the trainer.")
    pieces = split_text(tokenizer, text, CONTEXT)
    if not pieces:
        raise PatError(f"Got calibration={path!r}, of which the tokenizer makes no token; expected text it can read.")
    return pieces


def batches_from_text_file(path: str, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Yield batches of consecutive pieces of a text file, `input_ids` of shape `(batch, 512)`, the rest dropped.

    Raises:
        PatError: see `calibration_pieces`.
    """
    pieces = calibration_pieces(path, tokenizer)
    rows = torch.tensor([piece for piece in pieces if len(piece) == len(pieces[0])])
    for start in range(0, len(rows), BATCH_SIZE):
        yield {"input_ids": rows[start : start + BATCH_SIZE]}
