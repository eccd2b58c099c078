"""Options of `pat merge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class MergeOptions:
    """What is merged, and how it is written."""

    adapter: str = field(metadata={"help": "Folder of a PAT adapter."})
    output_dir: Path = field(metadata={"help": "Folder of the dense checkpoint; it must be empty or new."})
    base_model: str | None = field(
        default=None, metadata={"help": "Base model, if it has moved since the adapter was trained."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Dtype of the written weights, such as bfloat16; by default the base's."}
    )
    text_file: str | None = field(
        default=None, metadata={"help": "Text to compare masked and dense model on; by default a built-in one."}
    )
    max_shard_size: str | None = field(
        default=None, metadata={"help": "Largest weight file, such as 5GB; by default as large as the base's."}
    )
    fold_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype to fold in: float64 or float32; by default float32 for weights of 16 bits."},
    )
    device: str = field(default="cpu", metadata={"help": "Device that computes, such as cuda."})
