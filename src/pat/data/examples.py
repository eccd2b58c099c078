"""Examples of a dataset that models are measured on, and not trained on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from pat.data.conversion import TemplateChoice
from pat.data.counts import count
from pat.data.kept import kept_of
from pat.data.load import load_training_data
from pat.data.record import DataRecord, make_record
from pat.data.remarks import position_remarks, remarks
from pat.data.tokens import TRAINED_ON, Encoder, Truncation, encode
from pat.data.vocabulary import Vocabulary
from pat.nll import Example
from pat.questions import evenly_spaced

logger = logging.getLogger(__name__)


def prepare_examples(
    name: str,
    vocabulary: Vocabulary,
    *,
    template: TemplateChoice,
    max_length: int | None,
    limit: int | None = None,
    config: Any = None,
) -> tuple[list[Example], DataRecord]:
    """Return the examples of a dataset to measure a model on, `limit` of them evenly spaced, cut at `max_length`.

    With the model's `config`, examples longer than it has positions are told of.

    Raises:
        PatError: the data cannot be read or converted, or has a token that the model has no embedding for.
    """
    data = load_training_data(name, tokenizer=vocabulary.tokenizer, template=template, held_out=0)
    spaced = evenly_spaced(len(data.train_rows), limit or None)
    data = replace(data, train_rows=data.train_rows.select(spaced))
    cut = Truncation(max_length)
    rows = encode(data.train_rows, Encoder(vocabulary.tokenizer, cut))
    counts = count(rows)
    vocabulary.check(counts.largest_token)
    record = make_record(data, counts, cut)
    for remark in remarks(record, data, counts, cut, teaches=False):
        logger.warning("%s", remark)
    if config is not None:
        for remark in position_remarks([counts], cut, config):
            logger.warning("%s", remark)
    return kept_of(rows, counts, cut).select_columns(TRAINED_ON).to_list(), record
