"""Trim a vocabulary: a tokenizer of fewer tokens that still encodes every text, and a model with as many embeddings.

A token of byte-pair encoding is made by merges of shorter tokens. As long as the merges that make a text's tokens are
kept, the smaller tokenizer encodes that text into the same tokens, because it passes through the same states; any other
text it encodes into more and shorter ones.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pat.errors import PatError
from pat.loading.config import NO_PADDING, TOKEN_IDS

logger = logging.getLogger(__name__)

MULTIPLE = 64
"""Number of tokens of which a trimmed vocabulary is a multiple, so that the output layer stays fast."""

_OF_GENERATION = (
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""Fields of a generation config that name single tokens beside the special ones."""

_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias")
"""Fields of a generation config that name sequences of tokens."""

_TOKENIZER_FILE, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def choose_tokens(
    tokenizer: PreTrainedTokenizerBase, counts: Mapping[int, int], size: int, *, needed: Iterable[int] = ()
) -> list[int]:
    """Choose the tokens of a trimmed vocabulary: special ones, single bytes, the commonest, and all that they need.

    Places that the counted tokens leave go to the tokens with the lowest ids, which are the commonest of the text that
    the tokenizer was made of.

    Args:
        tokenizer: of the base model; byte-pair encoding.
        counts: how often each token occurs in the text that the small model is for, by id.
        size: number of tokens to keep, a multiple of `MULTIPLE` below the tokenizer's own.
        needed: ids of further tokens that stay, such as those that a configuration names.

    Returns:
        The ids that stay, ascending; a token's place in the list is its id in the trimmed vocabulary.

    Raises:
        PatError: the tokenizer is of another kind, or the size is not such a number, or too small for what has to stay.
    """
    spec = _specification(tokenizer)
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    if not 0 < size < len(tokenizer) or size % MULTIPLE:
        raise PatError(
            f"Got vocabulary_size={size}; expected a multiple of {MULTIPLE} below the tokenizer's {len(tokenizer)}."
        )
    special = {token["id"] for token in spec["added_tokens"]}
    unknown = spec["model"].get("unk_token")
    kept = special | {vocabulary[token] for token in _alphabet(spec)} | ({vocabulary[unknown]} if unknown else set())
    names = {token_id: token for token, token_id in vocabulary.items()}
    derive = _Derivations(spec["model"])
    for token in {*tokenizer.all_special_ids, *needed} & names.keys():  # an end token need not be marked as special
        kept |= {vocabulary[part] for part in derive(names[token])}
    if len(kept) > size:
        raise PatError(f"Got vocabulary_size={size}, but {len(kept)} tokens are special or single bytes; give more.")
    commonest = sorted((token for token in counts if token in names), key=lambda token: (-counts[token], token))
    for token in [*commonest, *sorted(names)]:
        if len(kept) == size:
            break
        parts = {vocabulary[part] for part in derive(names[token])} - kept
        if len(kept) + len(parts) <= size:
            kept |= parts
    if len(kept) < size:  # what is left needs more places than there are
        kept |= set(sorted(set(names) - kept)[: size - len(kept)])
    return sorted(kept)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the same kind with the kept tokens alone, numbered by their place.

    Args:
        tokenizer: of the base model; stays as it is.
        kept: see `choose_tokens`.
    """
    spec, new_id = _specification(tokenizer), {old: new for new, old in enumerate(kept)}
    model = spec["model"]
    model["vocab"] = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    names = model["vocab"]
    model["merges"] = [[a, b] for a, b in pairs if a in names and b in names and a + b in names]
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber(spec.get("post_processor"), new_id)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():  # vocabularies in older formats, which loading might prefer
            if file.is_file() and file.suffix != ".jinja" and file.name not in (_TOKENIZER_FILE, _CONFIG_FILE):
                file.unlink()
        (folder / _TOKENIZER_FILE).write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        fields = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        if (decoder := fields.get("added_tokens_decoder")) is not None:
            fields["added_tokens_decoder"] = {str(new_id[int(old)]): token for old, token in decoder.items()}
        (folder / _CONFIG_FILE).write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        trimmed = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))
    trimmed.name_or_path = tokenizer.name_or_path
    return trimmed


def kept_tokens(tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokens of a trimmed tokenizer have in the one that it was made of, in its own order.

    Raises:
        PatError: it was made of another one.
    """
    old = tokenizer.get_vocab()
    tokens = sorted(trimmed.get_vocab().items(), key=lambda item: item[1])
    if strange := [token for token, _ in tokens if token not in old]:
        raise PatError(
            f"The trimmed tokenizer has {len(strange)} tokens that the base's has not, such as {strange[0]!r}; "
            "expected the base that it was made of."
        )
    return [old[token] for token, _ in tokens]


def trim_embedding(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave a model the embeddings of the kept tokens, in its input and output layers, and renumber its special tokens.

    Args:
        model: without adapters; changed in place.
        kept: see `choose_tokens`.
    """
    index = torch.tensor(kept)
    ends = {id(end): end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    rows = {key: _rows(cast(Any, end), index) for key, end in ends.items()}
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    for key, end in zip(rows, (model.get_input_embeddings(), model.get_output_embeddings()), strict=False):
        for name, value in rows[key].items():
            getattr(end, name).data.copy_(value)
    configs = (model.config, model.generation_config)
    if lost := sorted({token for config in configs for token in special_ids(config)} - set(kept)):
        logger.warning(
            "The trimmed vocabulary lacks tokens that the base's configuration names as special; they are named no "
            "longer: %s.",
            ", ".join(map(str, lost)),
        )
    named = (*_OF_GENERATION, *_SEQUENCES)
    before = {name: _num_named(getattr(model.generation_config, name, None)) for name in named}
    for config in configs:
        renumber_specials(config, kept)
    fewer = [n for n in named if _num_named(getattr(model.generation_config, n, None)) < before[n]]
    if fewer:
        logger.warning(
            "The trimmed vocabulary lacks tokens that the base's generation config names in %s; what it says of them "
            "is left out.",
            ", ".join(fewer),
        )


def _num_named(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else int(value is not None)


def special_ids(config: Any) -> list[int]:
    """Return the ids of the special tokens that a configuration names."""
    values = (getattr(config, name, None) for name in TOKEN_IDS)
    listed = (value if isinstance(value, list) else [value] for value in values)
    return [token for tokens in listed for token in tokens if token is not None and token != NO_PADDING]


def renumber_specials(config: Any, kept: Sequence[int]) -> None:
    """Renumber the tokens that the configuration of a model, or of generation, names; those not kept are left out.

    A sequence that is to be forbidden, forced or favoured stays only if all of its tokens are kept.
    """
    new_id = {old: new for new, old in enumerate(kept)}
    for name in (*TOKEN_IDS, *_OF_GENERATION):
        value = getattr(config, name, None)
        if isinstance(value, list):
            setattr(config, name, [new_id[token] for token in value if token in new_id])
        elif value is not None:
            setattr(config, name, new_id.get(value))
    for name in _SEQUENCES:
        if (value := getattr(config, name, None)) is not None:
            setattr(config, name, _renumbered(value, new_id) or None)


def _renumbered(value: Any, new_id: Mapping[int, int]) -> Any:
    """Return nested lists of tokens in their new numbers; None for a sequence with a token that is not kept."""
    if isinstance(value, dict):  # a bias for each sequence
        found = {_renumbered(tokens, new_id): bias for tokens, bias in value.items()}
        return {tokens: bias for tokens, bias in found.items() if tokens is not None}
    if all(isinstance(part, int) for part in value):
        new = [new_id.get(token) for token in value]
        return None if None in new else type(value)(new)
    if len(value) == 2 and isinstance(value[1], int | float):  # the same, as it is written
        tokens = _renumbered(value[0], new_id)
        return None if tokens is None else [tokens, value[1]]
    return [part for part in (_renumbered(part, new_id) for part in value) if part is not None] or None


class _Derivations:
    """Finds the tokens that byte-pair encoding passes through on its way to a token."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.vocabulary: dict[str, int] = model["vocab"]
        pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}

    def __call__(self, token: str) -> set[str]:
        """Return the token and all tokens that its merges go through; itself alone if no merges make it."""
        parts, passed = list(token), set(token)
        while len(parts) > 1:
            ranked = [(self.rank.get((a, b), len(self.rank)), at) for at, (a, b) in enumerate(pairwise(parts))]
            rank, at = min(ranked)
            if rank == len(self.rank):
                return {token}
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            passed.add(parts[at])
        return {part for part in passed if part in self.vocabulary} | {token}


def _specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a fresh copy of what a tokenizer's file says.

    Raises:
        PatError: it is not byte-pair encoding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = None if backend is None else json.loads(backend.to_str())
    kind = "one without a tokenizer.json" if spec is None else spec["model"]["type"]
    if spec is None or kind != "BPE":
        raise PatError(f"Got a tokenizer that is {kind}; only byte-pair encoding can be trimmed, leave the size out.")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if spec["model"].get(affix):
            raise PatError(f"Got a tokenizer with a {affix}, whose merges cannot be trimmed; leave the size out.")
    return cast(dict[str, Any], spec)


def _alphabet(spec: Mapping[str, Any]) -> set[str]:
    """Return the tokens with which every text can be written: the bytes, or else all single characters."""
    vocabulary = spec["model"]["vocab"]
    fallback = {token for token in vocabulary if len(token) == 6 and token.startswith("<0x") and token.endswith(">")}
    return fallback if spec["model"].get("byte_fallback") and fallback else {t for t in vocabulary if len(t) == 1}


def _renumber(processor: Any, new_id: Mapping[int, int]) -> None:
    """Renumber the special tokens that a post-processor puts around a text."""
    if isinstance(processor, list):
        for part in processor:
            _renumber(part, new_id)
    elif isinstance(processor, dict):
        for token in (processor.get("special_tokens") or {}).values():
            token["ids"] = [new_id[old] for old in token["ids"]]
        for name in ("sep", "cls"):
            if isinstance(processor.get(name), list):
                processor[name][1] = new_id[processor[name][1]]
        _renumber(processor.get("processors"), new_id)


def _rows(end: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value.detach()[index.to(value.device)].clone() for name, value in end.named_parameters(recurse=False)}
