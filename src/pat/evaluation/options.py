"""Options of `pat evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EvaluateOptions:
    """Which model is measured on what."""

    model: str = field(metadata={"help": "Model folder or hub id, or the folder of a PAT adapter."})
    text_file: str | None = field(default=None, metadata={"help": "Plain text: token perplexity over sliding windows."})
    dataset_name: str | None = field(default=None, metadata={"help": "Instruction data: mean NLL of its responses."})
    template: str = field(
        default="auto", metadata={"help": "Prompt template of instruction data (auto, chat, alpaca)."}
    )
    max_length: int = field(default=512, metadata={"help": "Context in tokens."})
    limit: int | None = field(
        default=None,
        metadata={"help": "At most this many rows, thousand tokens of text, or questions of each task."},
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Accuracy on tasks: their names, or 'paper' for its 14."}
    )
    data_dir: Path | None = field(
        default=None, metadata={"help": "Folder with a <task>.jsonl for each; by default from the hub."}
    )
    protocol: str | None = field(
        default=None, metadata={"help": "How tasks are asked: letter or likelihood; by default both."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Rows of a forward pass."})
    log_samples: bool = field(default=False, metadata={"help": "Keep the answer to every question of the tasks."})
    output_dir: Path | None = field(
        default=None, metadata={"help": "Keep finished tasks here; started again, none is repeated."}
    )
    output: Path | None = field(default=None, metadata={"help": "Also write the figures to this JSON file."})
