"""The loss of a model on data before and after its weights are quantised, which tells what a type of file costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pat.file_sizes.gguf_layout import GgufLayout
from pat.formats.gguf_file import read_gguf
from pat.loading import load_tokenizer
from pat.nll import NLL, Example, response_nll
from pat.report.progress import progress_bar
from pat.surgery.residual import model_tensors

MAX_LENGTH = 512
"""Longest row in tokens, unless it is said."""

BATCH_SIZE = 8
"""Rows in a forward pass."""


@dataclass(frozen=True)
class QuantizedLoss:
    """The loss on response tokens in float32, with the weights as they are and as the file has them.

    llama.cpp also rounds what goes into a matrix product to 8 bits, which is not in these figures.
    """

    dataset_name: str
    before: NLL
    after: NLL


class LossCheck:
    """Instruction data, read before the work, on which a model is measured twice."""

    def __init__(
        self, name_or_path: str, config: Any, dataset_name: str, *, max_length: int, limit: int | None
    ) -> None:
        """Read the data.

        Raises:
            PatError: it cannot be used, or the model has no tokenizer.
        """
        from pat.data.examples import prepare_examples  # what reads data takes seconds to import
        from pat.data.vocabulary import Vocabulary

        tokenizer: Any = load_tokenizer(name_or_path, config=config)
        self._pad = int(tokenizer.pad_token_id)
        self._examples: Sequence[Example]
        self._examples, record = prepare_examples(
            dataset_name,
            Vocabulary(tokenizer, config.vocab_size),
            template="auto",
            max_length=max_length,
            limit=limit,
            config=config,
        )
        self._source = record.source

    def measure(self, model: PreTrainedModel, layout: GgufLayout, path: Path) -> QuantizedLoss:
        """Return the loss before and after; the model is left with the file's weights."""
        before = self._nll(model, "Loss before")
        read_gguf(layout, path, model_tensors(model))
        return QuantizedLoss(self._source, before, self._nll(model, "Loss after"))

    def _nll(self, model: PreTrainedModel, title: str) -> NLL:
        with progress_bar(title, "batches") as progress:
            return response_nll(model, self._examples, batch_size=BATCH_SIZE, pad_token_id=self._pad, progress=progress)
