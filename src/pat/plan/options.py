"""Options of `pat plan`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for which model."""

    model_name_or_path: str = field(metadata={"help": "Base model folder or hub id; only its config is read."})
    pruning_ratio: float | None = field(
        default=None, metadata={"help": "Share of the hidden size to cut (default 0.25)."}
    )
    pruned_hidden_size: int | None = field(default=None, metadata={"help": "Exact hidden size instead of a ratio."})
    multiple_of: int | None = field(default=None, metadata={"help": "Hard alignment of the pruned hidden size."})
    untie_word_embeddings: bool = field(
        default=False, metadata={"help": "Whether a tied model gets an output matrix of its own."}
    )
    context: int | None = field(
        default=None, metadata={"help": "Tokens that costs are for (default 2048, or all the model can read)."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of tables."})
