"""Options of a comparison: models, data, methods and budget. Ready-made ones lie in `configs/`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compare.methods import METHODS, TUNED
from pat.errors import PatError
from pat.evaluation.options import BATCH_SIZE, PROTOCOLS

NOT_OF_A_CELL = (
    *("output_dir", "workers", "threads", "eval_batch_size", "keep_models", "redraw"),
    *("models", "methods", "ablations", "ratios", "seeds", "learning_rates"),
)
"""Fields that decide how a comparison is run and which cells it has, but no cell's figures."""


@dataclass
class CompareConfig:
    """One comparison. Every method sees the same rows in the same order, for the same number of steps."""

    models: list[str] = field(metadata={"help": "Folders or hub ids of the base models."})
    data: str = field(metadata={"help": "Instruction data: a file or hub id, as for `pat tune`."})
    methods: list[str] = field(metadata={"help": "Methods that are run at every ratio.", "choices": tuple(METHODS)})
    output_dir: Path = field(metadata={"help": "Folder, new, empty, or that of the comparison to go on with."})
    ratios: list[float] = field(
        default_factory=lambda: [0.2, 0.25, 0.3],
        metadata={
            "help": "Shares of the hidden size that PAT cuts; other methods are given the parameters that it then has."
        },
    )
    ablations: list[str] = field(
        default_factory=list,
        metadata={"help": "Methods that are run at --ablation_ratio alone.", "choices": tuple(METHODS)},
    )
    ablation_ratio: float = field(
        default=0.25, metadata={"help": "Ratio of the ablations, at which learning rates are searched, too."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Seeds of adapters, row order, and what is random in pruning."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [2e-4, 5e-4, 1e-3],
        metadata={
            "help": "Rates that are searched for each method, with the first seed at --ablation_ratio, by the NLL of "
            "the validation rows."
        },
    )
    search_steps: int | None = field(
        default=None, metadata={"help": "Steps of the runs of that search; by default as many as in all others."}
    )
    rank: int = field(
        default=64,
        metadata={
            "help": "Rank of LoRA on the whole model; the others get the rank whose trainable parameters come closest."
        },
    )
    lora_alpha: int = field(default=40, metadata={"help": "lora_alpha of every method, at --rank."})
    use_rslora: bool = field(default=True, metadata={"help": "Whether every method uses rank-stabilised LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of every method's LoRA."})
    mask_lr_multiplier: float = field(
        # The paper's is 1, which takes thousands of steps to make up a mask; for short runs its starting point is 2e-2
        # beside 5e-4.
        default=40.0,
        metadata={"help": "Learning rate of the paper's mask as a multiple of the adapters'."},
    )
    distill_weight: float | None = field(
        default=None, metadata={"help": "Share of the teacher in the loss of methods that have one. Default: 0.5."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether every method trains under bfloat16 autocast. Default: as `pat tune` does on the machine."
        },
    )
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps of every method."})
    epochs: float | None = field(default=None, metadata={"help": "Epochs of every method, instead of steps."})
    batch_size: int = field(default=4, metadata={"help": "Rows of a batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of a step."})
    max_length: int = field(default=256, metadata={"help": "Largest number of tokens of a row."})
    template: str = field(
        default="alpaca",
        metadata={"help": "How instructions become prompts.", "choices": ("alpaca", "chat", "auto")},
    )
    rows: int | None = field(default=None, metadata={"help": "Largest number of rows of the data to train on."})
    eval_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between measurements of the validation NLL while a method trains, for `curves.png`; "
            "by default there are none."
        },
    )
    held_out: int = field(default=400, metadata={"help": "Rows to report on."})
    validation: int = field(default=100, metadata={"help": "Rows to choose learning rates by."})
    tasks: list[str] | None = field(
        default_factory=lambda: ["paper"],
        metadata={"help": "Tasks whose accuracy is measured: names, 'paper' for its 14, or 'none'."},
    )
    data_dir: Path | None = field(
        default=None, metadata={"help": "Folder of the tasks' questions; by default they come from the hub."}
    )
    protocols: list[str] = field(
        default_factory=lambda: list(PROTOCOLS), metadata={"help": "How tasks are asked.", "choices": PROTOCOLS}
    )
    limit: int | None = field(default=None, metadata={"help": "Largest number of questions of each task."})
    eval_batch_size: int = field(default=BATCH_SIZE, metadata={"help": "Questions evaluated at once."})
    calibration_rows: int = field(
        default=64,
        metadata={"help": "Sequences of --max_length tokens that baselines prune by, drawn by the seed."},
    )
    workers: int = field(default=1, metadata={"help": "Cells to run at once."})
    threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of each worker; by default OMP_NUM_THREADS, or its share of the cores "
            "(where it is alone, fewer if they are measured to be faster)."
        },
    )
    keep_models: bool = field(
        default=False,
        metadata={"help": "Whether each cell's model stays in `models/` of the folder, for `pat evaluate` and others."},
    )
    redraw: bool = field(
        default=False, metadata={"help": "Run nothing, and write table and figures of the cells that are done."}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            PatError: methods, ratios or budgets do not fit together, or a number makes no sense.
        """
        self.output_dir = self.output_dir.expanduser()
        self.data_dir = None if self.data_dir is None else self.data_dir.expanduser()
        self.tasks = None if self.tasks == ["none"] else self.tasks
        for name in ("models", "methods", "ratios", "seeds", "learning_rates", "protocols"):
            values = getattr(self, name)
            if not values:
                raise PatError(f"Got no {name}; expected at least one.")
            if len(set(values)) < len(values):
                raise PatError(f"Got {name} {', '.join(map(str, values))}; expected each once.")
        unpruned = [name for name in self.ablations if not METHODS[name].prunes]
        if unpruned:
            raise PatError(f"Got the ablation {unpruned[0]!r}, which does not prune; list it under methods.")
        needy = [name for name in self.all_methods if METHODS[name].needs_tuned]
        if needy and TUNED not in self.methods:
            raise PatError(
                f"Got {needy[0]!r}, which prunes tuned models or learns from them, but not {TUNED!r}, whose they are; "
                "add it."
            )
        for ratio in (*self.ratios, self.ablation_ratio):
            if not 0 < ratio < 1:
                raise PatError(f"Got the ratio {ratio}; expected shares of the hidden size between 0 and 1.")
        if self.ablation_ratio not in self.ratios:
            raise PatError(f"Got ablation_ratio={self.ablation_ratio}; expected one of the ratios, {self.ratios}.")
        if (self.steps is None) == (self.epochs is None):
            raise PatError("Expected either --steps or --epochs, so that every method trains as long.")
        for name, value in asdict(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and value <= 0 and name != "lora_dropout":
                raise PatError(f"Got {name}={value}; expected a number above 0.")
        if self.distill_weight is not None and self.distill_weight > 1:
            raise PatError(f"Got distill_weight={self.distill_weight}; expected a share, at most 1.")
        if any(rate <= 0 for rate in self.learning_rates):
            raise PatError(f"Got the learning rates {self.learning_rates}; expected numbers above 0.")
        if min(self.seeds) < 0:
            raise PatError(f"Got the seed {min(self.seeds)}; expected numbers from 0 on.")

    def methods_at(self, ratio: float) -> list[str]:
        """Return the methods that are run at a ratio; 0.0 stands for those that do not prune."""
        if ratio == 0.0:
            return [name for name in self.methods if not METHODS[name].prunes]
        names = self.methods if ratio in self.ratios else []
        ablations = self.ablations if ratio == self.ablation_ratio else []
        return [name for name in dict.fromkeys((*names, *ablations)) if METHODS[name].prunes]

    @property
    def all_methods(self) -> list[str]:
        """Every method, in the order of the tables."""
        return list(dict.fromkeys((*self.methods, *self.ablations)))

    def identity(self) -> dict[str, Any]:
        """Return what decides the figures of every cell, see `row_identity`: rows of another one do not belong here."""
        facts = {name: value for name, value in asdict(self).items() if name not in NOT_OF_A_CELL}
        return facts | {
            "data": Path(self.data).name,
            "data_dir": None if self.data_dir is None else self.data_dir.name,
            "tasks": None if self.tasks is None else ",".join(self.tasks),
        }
