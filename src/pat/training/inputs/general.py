"""General text, on which a run measures its models beside its own data, so that what they forget shows."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pat.checkpoint.card import shown_name
from pat.errors import PatError, one_line
from pat.general_text import general_text
from pat.nll import Example, max_positions, text_windows

if TYPE_CHECKING:
    from pat.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

NONE = "none"
BUILT_IN = "pat/general.txt"
"""Name of the package's own text in records, which keep the last component alone of any other."""
CONTEXT = 256
"""Number of tokens in a window. So short, a text has windows enough for a standard error."""
MAX_CHARACTERS = 20_000
"""Number of characters that are read of a file: about 5,000 tokens, which each model of a run has to read."""


@dataclass(frozen=True)
class General:
    """A text to measure on, in windows; each of its tokens is scored once."""

    name: str
    windows: Sequence[Example]
    windows_of_base: Sequence[Example]
    """The same text in the base's tokens, where the vocabulary was trimmed."""

    @classmethod
    def of(cls, file: str | None, vocabulary: Vocabulary, untrimmed: Vocabulary, base_config: Any) -> General | None:
        """Read and tokenise a text file, the package's own text if there is none; None if it is called `none`.

        There is none, and a warning, if the tokenizer cannot read the package's own.

        Raises:
            PatError: the file cannot be used, or the model has no embedding for a token of it.
        """
        if file == NONE:
            return None
        context = min(CONTEXT, max_positions(base_config) or CONTEXT)
        text = general_text(None if file is None else os.path.expanduser(file), max_characters=MAX_CHARACTERS)
        try:
            of_base = windows = text_windows(untrimmed.tokenizer, text, context)
            untrimmed.check(max(max(window["input_ids"]) for window in of_base))
            if vocabulary is not untrimmed:
                windows = text_windows(vocabulary.tokenizer, text, context)
        except Exception as error:  # tokenizers raise bare exceptions where they do not know a letter
            if file is not None:
                raise PatError(f"Got general_text={file}, which cannot be measured on: {one_line(error)}") from error
            logger.warning(
                "What is forgotten is not measured: the tokenizer cannot read %s (%s).", BUILT_IN, one_line(error)
            )
            return None
        return cls(BUILT_IN if file is None else shown_name(file), windows, of_base)
