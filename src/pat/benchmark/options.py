"""Options of `pat benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pat.checkpoint.staging import check_output_folder
from pat.errors import PatError
from pat.paths import expand_options
from pat.ranges import check_ranges

FEWEST_REPETITIONS = 3
"""Fewer repetitions have no spread to speak of."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BenchmarkOptions:
    """A comparison of two models. Lists are sorted and free of repetitions."""

    model: str = field(metadata={"help": "Folder or hub id of the smaller model.", "names": "model"})
    baseline: str = field(
        metadata={"help": "Folder or hub id of the model that it is compared with.", "names": "model"}
    )
    contexts: list[int] = field(
        default_factory=lambda: [128, 512, 2048],  # 128 is the paper's
        metadata={
            "help": "Tokens of each sequence that are read, and held in the cache when generation starts.",
            "range": "[1, inf)",
        },
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8, 16], metadata={"help": "Sequences in a batch.", "range": "[1, inf)"}
    )
    new_tokens: int = field(
        default=32, metadata={"help": "Tokens to generate for each sequence; 0 for none.", "range": "[0, inf)"}
    )
    repetitions: int = field(
        default=5, metadata={"help": "Measurements of each model at each setting, taken in turns.", "range": "[1, inf)"}
    )
    warmup: int = field(
        default=1, metadata={"help": "Runs of each model at each setting before those that count.", "range": "[0, inf)"}
    )
    max_seconds: float | None = field(
        default=None,
        metadata={
            "help": "No repetition of a setting begins after as many seconds, once 3 are measured.",
            "range": "(0, inf)",
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of both models; by default the one each is stored in.", "choices": DTYPES},
    )
    device: str = field(
        default="auto", metadata={"help": "auto (an accelerator where there is one), cpu, or a name such as cuda:0."}
    )
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of each model; by default torch's choice.", "range": "[1, 4096]"},
    )
    output_dir: Path | None = field(
        default=None, metadata={"help": "Folder of JSON, table and figure; it must be empty or new."}
    )

    def __post_init__(self) -> None:
        """Refuse what makes no sense on any machine and with any model.

        Raises:
            PatError: a number or dtype that makes no sense, or an output folder that is not empty.
        """
        expand_options(self)
        check_ranges(self)
        for name in ("contexts", "batch_sizes"):
            counts = sorted(set(getattr(self, name)))
            if not counts:
                raise PatError(f"Got {name}={getattr(self, name)}; expected whole numbers, such as 1 8 16.")
            setattr(self, name, counts)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise PatError(f"Got dtype={self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.output_dir is not None:
            self.output_dir = check_output_folder(self.output_dir)
