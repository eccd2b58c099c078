"""A tokenizer as metadata of a GGUF file.

Two kinds are known: byte-level BPE (GPT-2, Llama 3, Qwen), of which llama.cpp knows the pre-tokenizers by name, and
BPE over pieces with a byte fallback (Llama 2, Mistral, Gemma), which llama.cpp merges by score. Whether llama.cpp reads
text as the tokenizer does is checked after the export, on a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from pat.errors import PatError
from pat.file_sizes.gguf_types import Entry
from pat.loading.hub import hub_options
from pat.loading.tokenizer import check_special_ids, end_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens in llama.cpp."""

_PREFIX = {"type": "Prepend", "prepend": "▁"}
_PIECES = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
"""Normalizers of tokenizers of pieces, with and without a space before a text."""

_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Pre-tokenizer of Gemma, which finds no space behind `_PIECES`."""

_METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
"""Pre-tokenizer that does what `_PIECES` does, with a space before a text or without, by its `prepend_scheme`."""

_OTHER_SPACES = {
    "first": "The tokenizer puts a space before a text that begins neither with one nor with a special token.",
    "always": "The tokenizer puts a space before a text and behind special tokens unless there is one.",
}
"""Behaviour of a tokenizer for each `prepend_scheme` that llama.cpp lacks. transformers 5 gives Llama 2's tokenizer
"first", or "always" if its file says `legacy`. The GGUF file asks llama.cpp for spaces, as llama.cpp's own converter
does, because a text without special tokens is then read alike; the prompts of a chat template may not be."""

ENDS = ("eot", "eom")
"""Names in llama.cpp of end tokens beside the tokenizer's own: the end of a turn, and of a message."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST, "ByteLevel"): "llama-bpe",
    (_CONTRACTIONS + _WORDS + r"\p{N}" + _REST, "ByteLevel"): "qwen2",
}
"""llama.cpp's names of pre-tokenizers, by the steps that `tokenizer.json` has: patterns, or kinds of steps."""

_PHI3 = r"(?i)phi-?3"
_PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
"""Special tokens that keep the white space behind them where a model's name matches `_PHI3`; in llama.cpp all others
then strip it. A file of such a name that lacks one of these is not loaded."""


def stored_end_tokens(name_or_path: str) -> list[int]:
    """Return the tokens with which generation stops, by the generation configuration of a model; none without one.

    Raises:
        PatError: there is no such model, see `hub_options`.
    """
    try:
        return end_tokens(GenerationConfig.from_pretrained(name_or_path, **hub_options(name_or_path)))
    except OSError:
        return []


def unnamed_ends(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[str]:
    """Return the end tokens that the metadata of a tokenizer has no place for."""
    return [str(tokenizer.convert_ids_to_tokens(end)) for end in _others(tokenizer, ends)[len(ENDS) :]]


def name_in_file(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name that is written into a file: llama.cpp strips white space where a name is that of Phi-3."""
    if _strips_as_phi3(tokenizer):
        return name if re.search(_PHI3, name) else f"phi-3 {name}"
    return re.sub(_PHI3, "phi 3", name)


def unlike_added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the added tokens that strip white space, or match whole words only, which no GGUF file can express."""
    added = tokenizer.added_tokens_decoder.values()
    said = _strips_as_phi3(tokenizer)
    return [str(token) for token in added if token.lstrip or token.single_word or (token.rstrip and not said)]


def unlike_spaces(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a sentence that says where a tokenizer puts spaces, or None if llama.cpp puts the same ones."""
    steps = _steps(json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer"), "pretokenizers")
    schemes = (step.get("prepend_scheme") for step in steps)
    return next((_OTHER_SPACES[scheme] for scheme in schemes if scheme in _OTHER_SPACES), None)


def _strips_as_phi3(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the added tokens strip the white space behind them as llama.cpp does under the name of Phi-3."""
    added = {token.content: token.rstrip for token in tokenizer.added_tokens_decoder.values()}
    alike = all(rstrip == (token not in _PHI3_KEEPS) for token, rstrip in added.items())
    return alike and added.keys() > _PHI3_KEEPS | {"</s>"}


def _others(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    return [end for end in dict.fromkeys(ends) if end != tokenizer.eos_token_id]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int] = ()) -> list[Entry]:
    """Return the metadata of a tokenizer.

    Args:
        tokenizer: with a `tokenizer.json`.
        vocab_size: rows of the model's embedding; rows without a token become unused tokens.
        ends: tokens with which generation stops. Beside the tokenizer's own, a file can name two: those that llama.cpp
            calls the end of a turn and the end of a message.

    Raises:
        PatError: llama.cpp has no such tokenizer, or a special token has no row in the embedding.
    """
    check_special_ids(tokenizer, vocab_size)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if backend is not None else {}
    bpe = model.get("model", {})
    if bpe.get("type") != "BPE":
        raise _unknown(f"a model of type {bpe.get('type')}")
    if any(bpe.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise _unknown("dropout of merges, or a mark within or behind words")
    first = _first(tokenizer)
    tokens, kinds = _tokens(tokenizer, vocab_size, has_bytes=bool(bpe.get("byte_fallback")))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in bpe["merges"]]
    entries = [
        Entry("tokenizer.ggml.tokens", "[str]", tokens),
        Entry("tokenizer.ggml.token_type", "[i32]", kinds),
    ]
    steps = _steps(model.get("normalizer"), "normalizers")
    if bpe.get("byte_fallback"):
        found = [*steps, *_steps(model.get("pre_tokenizer"), "pretokenizers")]
        metaspaces = [[_METASPACE | {"prepend_scheme": scheme}] for scheme in ("never", *_OTHER_SPACES)]
        if found not in (_PIECES, [_PREFIX, *_PIECES], [*_PIECES, _SPLIT], *metaspaces):
            raise _unknown(f"pieces with a byte fallback behind {_named(found)}")
        entries += [
            Entry("tokenizer.ggml.model", "str", "llama"),
            Entry("tokenizer.ggml.pre", "str", "default"),
            Entry("tokenizer.ggml.scores", "[f32]", _scores(tokens, merges)),
            Entry("tokenizer.ggml.add_space_prefix", "bool", _PREFIX in steps or found in metaspaces[1:]),
        ]
    else:
        if any(step["type"] != "NFC" for step in steps):
            raise _unknown(f"byte-level BPE behind the normalizer {_named(steps)}")
        entries += [
            Entry("tokenizer.ggml.model", "str", "gpt2"),
            Entry("tokenizer.ggml.pre", "str", _pre_tokenizer(model.get("pre_tokenizer"))),
            Entry("tokenizer.ggml.merges", "[str]", [" ".join(_spaced(part) for part in pair) for pair in merges]),
        ]
    others = _others(tokenizer, ends)
    entries += [Entry(f"tokenizer.ggml.{name}_token_id", "u32", end) for name, end in zip(ENDS, others, strict=False)]
    return [*entries, *_special(tokenizer, first)]


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, has_bytes: bool) -> tuple[list[str], list[int]]:
    added = tokenizer.added_tokens_decoder
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokens: list[str] = []
    kinds: list[int] = []
    for token_id in range(vocab_size):
        token = by_id.get(token_id)
        if token is None:
            tokens.append(f"[PAD{token_id}]")
            kinds.append(UNUSED)
            continue
        kind = NORMAL
        if token_id in added:
            kind = CONTROL if added[token_id].special else USER_DEFINED
        elif has_bytes and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        if has_bytes and token == tokenizer.unk_token:
            kind = UNKNOWN
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score for each token: the earlier a merge makes it, the higher."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(steps: dict[str, Any] | None) -> str:
    """Return llama.cpp's name of a pre-tokenizer."""
    parts = _steps(steps, "pretokenizers")
    found = tuple(part.get("pattern", {}).get("Regex") or part["type"] for part in parts)
    usual: dict[str, dict[str, Any]] = {
        "Digits": {"individual_digits": True},
        "Split": {"behavior": "Isolated", "invert": False},
        "ByteLevel": {"add_prefix_space": False, "use_regex": not any(part["type"] == "Split" for part in parts)},
    }
    alike = all(part[name] == value for part in parts for name, value in usual.get(part["type"], {}).items())
    if found not in PRE_TOKENIZERS or not alike:
        raise _unknown(f"the pre-tokenizer {_named(parts)}")
    return PRE_TOKENIZERS[found]


def _steps(whole: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence, or none."""
    return (whole.get(of) or [whole]) if whole else []


def _named(steps: list[dict[str, Any]]) -> str:
    """Return the text that names steps in a message, each with its settings."""
    said = [f"{step['type']} ({', '.join(f'{k}={v!r}' for k, v in step.items() if k != 'type')})" for step in steps]
    return (" + ".join(said) or "none")[:300]


def _first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer puts its bos token before a text. A file can ask for this token and for no other.

    Raises:
        PatError: it puts other tokens around a text.
    """
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    first = bool(whole[:1] == [tokenizer.bos_token_id])
    if whole != [*whole[: int(first)], *text]:
        around = ", ".join(map(str, tokenizer.convert_ids_to_tokens(whole)))
        raise _unknown(f"tokens around every text beyond one that opens it ({around})")
    return first


def _spaced(part: str) -> str:
    """Return a part of a merge without a space in it, which stands between the parts."""
    return part.replace(" ", "Ġ")


def _special(tokenizer: PreTrainedTokenizerBase, first: bool) -> list[Entry]:
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    named["padding"] = tokenizer.pad_token_id
    entries = [
        Entry(f"tokenizer.ggml.{name}_token_id", "u32", token_id)
        for name, token_id in named.items()
        if token_id is not None
    ]
    entries.append(Entry("tokenizer.ggml.add_bos_token", "bool", first))
    entries.append(Entry("tokenizer.ggml.add_eos_token", "bool", False))
    template: Any = tokenizer.chat_template
    if isinstance(template, str):
        entries.append(Entry("tokenizer.chat_template", "str", template))
    return entries


def _unknown(what: str) -> PatError:
    return PatError(
        f"Got a tokenizer with {what}, which this export does not know by llama.cpp's name; expected byte-level BPE "
        "with the pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen, or pieces with a byte fallback. Use --format onnx, "
        "or llama.cpp's own converter."
    )
