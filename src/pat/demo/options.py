"""Options of `pat demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo runs, and what is different from the usual."""

    output_dir: Path = field(default=Path("pat-demo"), metadata={"help": "Folder of the run; it must be empty or new."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instruction data; by default the small set that comes with the package."}
    )
    cache_dir: Path | None = field(default=None, metadata={"help": "Where the downloaded base model is kept."})
    pruning_ratio: float | None = field(default=None, metadata={"help": "Share of the hidden size to cut."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps; more give a better model."})
