"""The tokenizer and generation config of an adapter: those of the run that it is of, or those of its base."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)

from pat.errors import PatError, one_line
from pat.loading import TokenSetup, check_special_ids
from pat.loading.hub import hub_options
from pat.loading.tokenizer import load_plain_tokenizer

CHAT_TEMPLATE_FILE = "chat_template.jinja"

_TOKENIZER_PARTS = (FULL_TOKENIZER_FILE, "tokenizer.model", "vocab.json", ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE)
"""Files of a tokenizer that are none without its configuration."""


def adapter_tokens(
    adapter: str | os.PathLike[str], name: str, base_config: PretrainedConfig, *, revision: str | None = None
) -> TokenSetup:
    """Return the tokenizer and generation config of the run that an adapter is of, or else those of its base model.

    Raises:
        PatError: neither has a tokenizer, a part of the adapter's is missing, or its special tokens lie beyond the
            base's embedding.
    """
    folder = Path(adapter)
    is_there = (folder / TOKENIZER_CONFIG_FILE).is_file()
    if not is_there and (parts := [file for file in _TOKENIZER_PARTS if (folder / file).is_file()]):
        raise PatError(
            f"{folder}: holds {parts[0]}, but no {TOKENIZER_CONFIG_FILE} that belongs to it; put that back, or remove "
            "the files of the tokenizer to have the base's."
        )
    tokenizer = load_plain_tokenizer(str(folder)) if is_there else load_plain_tokenizer(name, revision=revision)
    if not is_there and (template := _template_of(folder)) is not None:
        tokenizer.chat_template = template
    check_special_ids(tokenizer, base_config.vocab_size)
    generation_config = base_tokenizer = None
    with suppress(OSError, PatError):
        hub = hub_options(name, revision)
        generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main", **hub)
    with suppress(OSError):
        generation_config = GenerationConfig.from_pretrained(folder)
    if is_there:
        with suppress(PatError):
            base_tokenizer = load_plain_tokenizer(name, revision=revision)
    return TokenSetup.of(base_config, generation_config, tokenizer, base_tokenizer=base_tokenizer)


def _template_of(folder: Path) -> str | None:
    """Return the chat template that lies in a folder, without a tokenizer."""
    path = folder / CHAT_TEMPLATE_FILE
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatError(f"{path}: not readable ({one_line(error)}); expected a Jinja template.") from error
