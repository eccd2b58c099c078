"""The options of `pat merge`: flags, YAML keys and Python keywords alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pat.errors import PatError
from pat.paths import expand_options

DTYPES = ("float32", "bfloat16", "float16")
FOLD_DTYPES = ("float64", "float32")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The adapter to merge, and the form in which the model is written.

    Raises:
        PatError: a dtype that there is none of.
    """

    adapter: str | Path = field(
        metadata={"help": "Folder of the adapter, of a PAT run or of its compact model.", "names": "adapter"}
    )
    output_dir: str | Path = field(
        metadata={"help": "A new or empty folder for the model; it appears complete, or not at all."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of the base, if it is no longer where it was.", "names": "model"},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Data type of the weights, such as bfloat16; by default the base's."}
    )
    text_file: str | Path | None = field(
        default=None, metadata={"help": "Text to compare tuned and dense model on; by default a built-in one."}
    )
    max_shard_size: str | None = field(
        default=None, metadata={"help": "Largest weight file, such as 5GB; by default as large as the base's."}
    )
    fold_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type to fold in, float64 or float32; by default float32 for weights of 16 bits, else float64."
        },
    )
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu, auto, or a name such as cuda:0."})

    def __post_init__(self) -> None:
        expand_options(self)
        for name, allowed in (("dtype", DTYPES), ("fold_dtype", FOLD_DTYPES)):
            given = getattr(self, name)
            if given is not None and str(given).removeprefix("torch.") not in allowed:
                raise PatError(f"Got {name}={given!r}; expected {', '.join(allowed[:-1])} or {allowed[-1]}.")
