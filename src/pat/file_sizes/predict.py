"""File sizes of a model by type, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pat.errors import PatError
from pat.file_sizes.gguf_families import GGUF_FAMILIES
from pat.file_sizes.gguf_layout import layout_of
from pat.file_sizes.gguf_types import QUANTIZATIONS, TYPES, Entry
from pat.file_sizes.gguf_vocabulary import stored_end_tokens, vocabulary_of
from pat.file_sizes.int4_size import Int4Size, int4_size
from pat.loading.tokenizer import load_plain_tokenizer
from pat.surgery.costs import Skeleton

GGUF_TYPES = ("Q8_0", "Q4_K_M")
"""Types of GGUF files that a plan shows."""

NAME = "a model"
"""Name of the model in a file whose size is predicted; another one changes the size by its length."""


@dataclass(frozen=True)
class FileSizes:
    """Sizes of a model's files in bytes; those of GGUF files are exact, metadata and vocabulary included.

    A chat template that `pat tune` adds is not among them, a kilobyte.
    """

    bf16: int
    """Tensors in bfloat16."""
    int8: int
    """Linear modules in 8 bits with a float32 scale a row (bitsandbytes); all else in bfloat16: embeddings, head,
    norms, routers and experts that are stacked in one parameter."""
    int4: Int4Size
    """Linear modules and experts in 4 bits (AWQ, GPTQ) for vLLM's Marlin kernels."""
    gguf: dict[str, int]
    """Sizes of GGUF files by type, see `QUANTIZATIONS`; empty where the family cannot be written so."""
    odd_rows: dict[str, dict[str, float]]
    """Share of all parameters in rows that fall back to a larger type, by the type of the file and the rows' length."""


def vocabulary_entries(name_or_path: str, vocab_size: int) -> tuple[list[Entry], str | None]:
    """Return the metadata of the tokenizer beside a model, and a sentence where it cannot be counted."""
    try:
        return vocabulary_of(load_plain_tokenizer(name_or_path), vocab_size, stored_end_tokens(name_or_path)), None
    except PatError as error:
        return [], f"GGUF sizes are without a vocabulary. {error}"


def file_sizes(skeleton: Skeleton, vocabulary: Sequence[Entry]) -> tuple[FileSizes, str | None]:
    """Return the sizes of a model's files, and the reason where llama.cpp could not run it.

    Args:
        skeleton: the model, without weights.
        vocabulary: metadata of its tokenizer, see `vocabulary_entries`.
    """
    shapes = skeleton.shapes()
    half = sum(math.prod(shape) for shape in shapes.values()) * TYPES["BF16"].num_bytes
    linear = [shapes[name] for name in _quantised(skeleton)]
    int8 = half - sum(math.prod(shape) for shape in linear) + sum(4 * math.prod(shape[:-1]) for shape in linear)
    sizes: dict[str, int] = {}
    odd: dict[str, dict[str, float]] = {}
    reason: str | None = None
    if skeleton.model.config.model_type in GGUF_FAMILIES:
        total = sum(math.prod(shape) for shape in shapes.values())
        try:
            for name in GGUF_TYPES:
                layout = layout_of(skeleton, vocabulary, name=NAME, kind=QUANTIZATIONS[name])
                sizes[name] = layout.num_bytes(QUANTIZATIONS[name])
                rows = layout.odd_rows(QUANTIZATIONS[name])
                odd[name] = {str(row): count / total for row, count in rows.items()}
        except PatError as error:
            sizes, odd, reason = {}, {}, str(error)
    return FileSizes(bf16=half, int8=int8, int4=int4_size(skeleton), gguf=sizes, odd_rows=odd), reason


def _quantised(skeleton: Skeleton) -> list[str]:
    """Return the weights that bitsandbytes replaces: those of `nn.Linear` modules, hence of no router or stack."""
    modules = dict(skeleton.model.named_modules())
    return [linear.weight for linear in skeleton.linears() if isinstance(modules.get(linear.path), nn.Linear)]
