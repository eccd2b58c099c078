"""A tokenizer as metadata of a GGUF file.

Two kinds are known: byte-level BPE (GPT-2, Llama 3, Qwen), of which llama.cpp knows the pre-tokenizers by name, and
BPE over pieces with a byte fallback (Llama 2, Mistral, Gemma), which llama.cpp merges by score. Whether llama.cpp reads
text as the tokenizer does is checked after the export, on a text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from pat.errors import PatError
from pat.file_sizes.gguf_types import Entry
from pat.loading.tokenizer import end_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens in llama.cpp."""

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


def stored_end_tokens(name_or_path: str) -> list[int]:
    """Return the tokens with which generation stops, by the generation configuration of a model; none without one."""
    try:
        return end_tokens(GenerationConfig.from_pretrained(name_or_path))
    except OSError:
        return []


def unnamed_ends(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[str]:
    """Return the end tokens that the metadata of a tokenizer has no place for."""
    return [str(tokenizer.convert_ids_to_tokens(end)) for end in _others(tokenizer, ends)[len(ENDS) :]]


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
        PatError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if backend is not None else {}
    bpe = model.get("model", {})
    if bpe.get("type") != "BPE":
        raise _unknown(f"a model of type {bpe.get('type')}")
    tokens, kinds = _tokens(tokenizer, vocab_size, has_bytes=bool(bpe.get("byte_fallback")))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in bpe["merges"]]
    entries = [
        Entry("tokenizer.ggml.tokens", "[str]", tokens),
        Entry("tokenizer.ggml.token_type", "[i32]", kinds),
    ]
    if bpe.get("byte_fallback"):
        if model.get("pre_tokenizer") is not None:
            raise _unknown("pieces with a byte fallback behind a pre-tokenizer")
        prefix = "Prepend" in json.dumps(model.get("normalizer"))
        entries += [
            Entry("tokenizer.ggml.model", "str", "llama"),
            Entry("tokenizer.ggml.pre", "str", "default"),
            Entry("tokenizer.ggml.scores", "[f32]", _scores(tokens, merges)),
            Entry("tokenizer.ggml.add_space_prefix", "bool", prefix),
        ]
    else:
        entries += [
            Entry("tokenizer.ggml.model", "str", "gpt2"),
            Entry("tokenizer.ggml.pre", "str", _pre_tokenizer(model.get("pre_tokenizer"))),
            Entry("tokenizer.ggml.merges", "[str]", [" ".join(_spaced(part) for part in pair) for pair in merges]),
        ]
    others = _others(tokenizer, ends)
    entries += [Entry(f"tokenizer.ggml.{name}_token_id", "u32", end) for name, end in zip(ENDS, others, strict=False)]
    return entries + _special(tokenizer)


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
    parts = (steps or {}).get("pretokenizers") or ([steps] if steps else [])
    found = tuple(part.get("pattern", {}).get("Regex") or part["type"] for part in parts)
    if found not in PRE_TOKENIZERS or not all(part.get("individual_digits", True) for part in parts):
        raise _unknown(f"the pre-tokenizer {' + '.join(found) or 'none'}"[:200])
    return PRE_TOKENIZERS[found]


def _spaced(part: str) -> str:
    """Return a part of a merge without a space in it, which stands between the parts."""
    return part.replace(" ", "Ġ")


def _special(tokenizer: PreTrainedTokenizerBase) -> list[Entry]:
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    named["padding"] = tokenizer.pad_token_id
    entries = [
        Entry(f"tokenizer.ggml.{name}_token_id", "u32", token_id)
        for name, token_id in named.items()
        if token_id is not None
    ]
    first = tokenizer("a")["input_ids"][:1]
    entries.append(Entry("tokenizer.ggml.add_bos_token", "bool", first == [tokenizer.bos_token_id]))
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
