"""Options of `pat tune` that are neither the method's nor the libraries'."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pat.errors import PatError
from pat.ranges import check_ranges
from pat.recipes import RECIPES
from pat.shape import ShapeOptions
from pat.training.refused import REFUSED

ON_BAD_ROW = ("error", "skip")

DISTILL_WEIGHTS = "(0, 1]"
"""Range of the share that the divergence from a teacher has in the loss."""


MAIN_FLAGS = (
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "pruning_ratio",
    "recipe",
    "template",
    "max_length",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lora_r",
    "seed",
)
"""Flags that most runs set, of all parts of the options. They open the help, and a misspelt flag is most likely one."""


@dataclass
class RunOptions:
    """Model, data and housekeeping of one run."""

    model_name_or_path: str = field(metadata={"help": "Base model: a folder or a hub id.", "names": "model"})
    dataset_name: str | list[str] = field(
        metadata={
            "help": "Training data: a hub id, a local .json, .jsonl, .parquet, .csv or .tsv file (also compressed as "
            ".gz, .bz2, .xz or .zst), or a folder of such files; its format is detected. Several are mixed. "
            "task:arc_easy,piqa (task:FOLDER/arc_easy,piqa for <task>.train.jsonl files) is the train split of tasks.",
            "names": "dataset",
        }
    )
    output_dir: Path = field(
        metadata={
            "help": "Folder of the run: model/, adapter/, compact/, results.json, report.html. New or empty, or that "
            "of the same command before, which goes on."
        }
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of each of several datasets in the examples that are trained on, as in 7 3; the rows of one "
            "that is too short for its share come more often. Default: every row once.",
            "range": "[0.000001, 1000000]",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the data while training goes on, instead of all of it before; needs --max_steps. The first "
            "rows are held out."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of hub datasets."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of each dataset to train on."})
    template: str = field(
        default="auto",
        metadata={"help": "How instructions become prompts: 'chat', 'alpaca', or 'auto' (chat if the tokenizer can)."},
    )
    vocabulary_size: int | None = field(
        default=None,
        metadata={
            "help": "Trim the vocabulary to so many tokens (a multiple of 64), those that the training data needs "
            "most; what it saves counts towards --pruning_ratio. Other text takes more tokens, but can be written.",
            "range": "[1, inf)",
        },
    )
    held_out: str | None = field(
        default=None,
        metadata={
            "help": "Rows kept apart for the final figures: a number, a share, or a file. Default: 1 in 50, up to 200, "
            "and of fewer than 1,000 rows up to a tenth until there are 20."
        },
    )
    general_text: str | None = field(
        default=None,
        metadata={
            "help": "Text file on which base and small model are measured as well, which shows what they forget. "
            "Default: four pages of the package's own; 'none' for none."
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What happens at a row that cannot be used: 'error' names it and ends the run, 'skip' leaves it "
            "out and counts it.",
            "choices": ON_BAD_ROW,
        },
    )
    recipe: str = field(
        default="default",
        metadata={"help": "Defaults under all other flags: 'default' (ours) or 'paper'.", "choices": RECIPES},
    )
    no_compact: bool = field(
        default=False,
        metadata={"help": "Train at full width to the end, instead of shrinking the model at the milestone."},
    )
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Push the finished OUTPUT_DIR/model to the hub, as --hub_model_id or under OUTPUT_DIR's own name."
        },
    )
    hub_token: str | None = field(
        default=None,
        metadata={
            "help": "Token to push with; `hf auth login` is the better way. It is written nowhere.",
            "secret": True,
        },
        repr=False,
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start anew, and remove what an earlier run has left in OUTPUT_DIR, whatever it was."},
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Leave the trainer's checkpoints in OUTPUT_DIR/checkpoints after success."}
    )

    @property
    def same_command(self) -> str:
        """Words for the command that goes on with the run; the same one with --overwrite would begin anew."""
        return "the same command without --overwrite" if self.overwrite else "the same command"

    def __post_init__(self) -> None:
        if isinstance(self.held_out, bool):
            raise PatError(f"Got held_out={self.held_out}; expected a number of rows, a share below 1, or a file.")
        check_ranges(self)
        names, weights = self.dataset_names, self.dataset_weights
        if not names:
            raise PatError("Got no dataset_name; expected a hub id, a file or a folder.")
        if weights is not None and (len(weights) != len(names) or len(names) == 1):
            raise PatError(
                f"Got {len(weights)} dataset_weights for {len(names)} dataset_name; expected one weight for each of "
                "several datasets."
            )
        places = [os.path.realpath(name) if os.path.exists(name) else name for name in names]
        if again := [name for number, name in enumerate(names) if places[number] in places[:number]]:
            raise PatError(f"Got dataset_name={again[0]} twice; give it once, with the weight that it is to have.")

    @property
    def dataset_names(self) -> list[str]:
        """Names of all datasets."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else [str(name) for name in self.dataset_name]


@dataclass
class DistillOptions:
    """Whether the small model learns from a larger one as well, in stage two."""

    distill: bool = field(
        default=False,
        metadata={
            "help": "Have the small model learn from a teacher, too: the base with the LoRA of stage one, if "
            "--milestone leaves one."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Another teacher, a folder or hub id of a model with the base's tokenizer; sets --distill.",
            "names": "model",
        },
    )
    distill_weight: float = field(
        default=0.5,
        metadata={"help": "Share of the divergence from the teacher in the loss.", "range": DISTILL_WEIGHTS},
    )
    distill_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Ask the teacher once for each row and keep its K likeliest tokens on disk, all others as one; it "
            "pays over several epochs. Default: the whole vocabulary, asked at each step.",
            "range": "[1, inf)",
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self.distill = self.distill or self.teacher is not None


@dataclass(frozen=True)
class EarlyOptions:
    """Options of `pat tune` that need nothing large, and are looked at before the import of those that do."""

    run: RunOptions
    distill: DistillOptions
    shape: ShapeOptions

    MAIN_FLAGS: ClassVar = MAIN_FLAGS
    REFUSED: ClassVar = REFUSED
