"""Options of `pat evaluate`, and the checks that need no model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pat.checkpoint.places import RESULTS
from pat.errors import PatError
from pat.paths import check_writable, expand_options
from pat.questions import resolve_tasks
from pat.ranges import check_ranges

PROTOCOLS = ("letter", "likelihood")

BATCH_SIZE = 8
"""The harness holds the logits of a whole batch twice: more rows take gigabytes where the vocabulary is large."""

COMMAND = "evaluate"

ANSWERS = "answers-"
"""Begins the names of the files in which the answers to tasks are kept."""


@dataclass
class EvaluateOptions:
    """One evaluation of one model."""

    model: str = field(metadata={"help": "Model folder or hub id, or the folder of a PAT adapter.", "names": "model"})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of an adapter's base, if it is no longer where it was.", "names": "model"},
    )
    text_file: Path | None = field(default=None, metadata={"help": "Plain text whose perplexity is measured."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Instruction data; the mean NLL of its responses is measured.", "names": "dataset"},
    )
    template: str = field(
        default="auto", metadata={"help": "Prompt template of the instruction data: auto, chat or alpaca."}
    )
    max_length: int = field(
        default=512,
        metadata={"help": "Longest context in tokens, of the text and of the instruction data.", "range": "[1, inf)"},
    )
    limit: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of rows of the data, of thousands of tokens of the text, and of questions of each "
            "task. Rows and questions are taken evenly spaced, while `lm_eval --limit` takes the first ones.",
            "range": "[1, inf)",
        },
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks whose accuracy is measured: their names, or 'paper' for its 14."}
    )
    data_dir: Path | None = field(
        default=None, metadata={"help": "Folder with a <task>.jsonl for each task; without it they come from the hub."}
    )
    protocol: list[str] = field(
        default_factory=lambda: list(PROTOCOLS),
        metadata={"help": "How tasks are asked: by letter, by likelihood, or both.", "choices": PROTOCOLS},
    )
    batch_size: int = field(
        default=BATCH_SIZE, metadata={"help": "Number of rows in a forward pass.", "range": "[1, inf)"}
    )
    log_samples: bool = field(
        default=False, metadata={"help": "Keep the answer to every question of the tasks in --output_dir."}
    )
    output_dir: Path | None = field(
        default=None,
        metadata={"help": "Folder for the figures; answers to tasks are kept there and not asked for again."},
    )
    output: Path | None = field(default=None, metadata={"help": "JSON file that the figures are also written to."})

    def __post_init__(self) -> None:
        """Refuse what cannot be done, before anything is loaded or written.

        Raises:
            PatError: there is nothing to evaluate on, options do not fit together, or the output cannot be written.
        """
        expand_options(self)
        if self.text_file is None and self.dataset_name is None and self.tasks is None:
            raise PatError(
                "Got nothing to evaluate on; give --text_file (plain text), --dataset_name (instruction data) or "
                "--tasks."
            )
        check_ranges(self)
        wrong = [name for name in self.protocol if name not in PROTOCOLS]
        if wrong or not self.protocol:
            raise PatError(
                f"Got the protocol {', '.join(wrong) or 'none'}; expected {' or '.join(PROTOCOLS)}, or both."
            )
        if self.tasks is not None:
            resolve_tasks(self.tasks)
        elif self.data_dir is not None or self.log_samples or self.output_dir is not None:
            raise PatError("Got --data_dir, --log_samples or --output_dir without --tasks; expected --tasks with them.")
        elif set(self.protocol) != set(PROTOCOLS):
            raise PatError("Got --protocol without --tasks, which alone are asked so; expected --tasks with it.")
        if self.template != "auto" and self.dataset_name is None:
            raise PatError("Got --template without --dataset_name, whose rows alone it shapes; leave it out.")
        if self.log_samples and self.output_dir is None:
            raise PatError("Got --log_samples without --output_dir; expected a folder for the answers.")
        if self.output is not None:
            check_writable(self.output)
            if os.path.isdir(self.output):
                raise PatError(f"Got output={self.output}, which is a folder; expected the name of a JSON file.")
            _check_output(self.output)
        if self.output_dir is not None:
            self._check_output_dir(self.output_dir)

    @property
    def model_digest(self) -> str:
        """Digest of the model's full path or hub id, and of those of the base if one is given."""
        names = [name for name in (self.model, self.base_model) if name is not None]
        name = "\0".join(os.path.realpath(name) if os.path.isdir(name) else name for name in names)
        return hashlib.sha256(name.encode()).hexdigest()[:16]

    def _check_output_dir(self, folder: Path) -> None:
        """Refuse a folder that holds anything but what an evaluation of this model, finished or not, has left."""
        check_writable(folder)
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise PatError(f"Got output_dir={folder}, which is a file; expected a folder.")
        check_writable(folder / RESULTS)
        if not os.path.isdir(folder) or not any(folder.iterdir()):
            return
        path = folder / RESULTS
        if not os.path.exists(path) and any(folder.glob(f"{ANSWERS}*")):
            return
        earlier = _read_evaluation(path)
        if not earlier:
            raise PatError(f"{folder}: holds files, but no evaluation; give an --output_dir of its own, or a new one.")
        if earlier.get("model_digest") != self.model_digest:
            raise PatError(
                f"{folder}: holds the evaluation of another model ({earlier.get('model')}), not of {self.model}; give "
                "another --output_dir."
            )


def _check_output(file: Path) -> None:
    """Refuse to write over anything but the figures of an earlier evaluation, or a file with nothing in it."""
    if os.path.isfile(file) and os.path.getsize(file) and not _read_evaluation(file):
        raise PatError(
            f"Got output={file}, which exists and is not what an evaluation has written; give another name for the "
            "figures, or move it away first."
        )


def _read_evaluation(file: Path) -> dict[str, Any]:
    """Return the record of an evaluation, empty if the file is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and record.get("command") == COMMAND else {}
