"""Options of `pat benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FEWEST_REPETITIONS = 3
"""With fewer there is no spread to speak of."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """A comparison of two models. Lists are sorted and free of repetitions."""

    model: str = field(metadata={"help": "Folder or hub id of the smaller model."})
    baseline: str = field(metadata={"help": "Folder or hub id of the model that it is compared with."})
    contexts: list[int] = field(
        default_factory=lambda: [128, 512, 2048],  # 128 is the paper's
        metadata={"help": "Tokens of each sequence that are read, and held in the cache when generation starts."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 16], metadata={"help": "Sequences in a batch."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens to generate for each sequence; 0 for none."})
    repetitions: int = field(
        default=5, metadata={"help": "Measurements of each model at each setting, taken in turns."}
    )
    warmup: int = field(default=1, metadata={"help": "Runs of each model at each setting before those that count."})
    max_seconds: float | None = field(
        default=None,
        metadata={"help": "No repetition of a setting begins after as many seconds, once 3 are measured."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Dtype of both models, such as float32; by default the one each is stored in."}
    )
    device: str = field(
        default="auto", metadata={"help": "auto (an accelerator where there is one), cpu, or a name such as cuda:0."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each model; by default torch's choice."}
    )
    output_dir: Path | None = field(
        default=None, metadata={"help": "Folder of JSON, table and figure; it must be empty or new."}
    )

    def __post_init__(self) -> None:
        for name in ("contexts", "batch_sizes"):
            object.__setattr__(self, name, sorted(set(getattr(self, name))))
