"""Configuration of a PAT adapter: everything `LoraConfig` takes, and the method's own fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from pat.errors import PatError
from pat.tuner.register import PatType
from pat.widths import DEFAULT_PRUNING_RATIO

_CHOICES = {
    "mask": ("trainable", "frozen"),
    "rotation": ("auto", "pca", "none"),
}


@dataclass
class PatConfig(LoraConfig):
    """Configuration of pruning-aware tuning with LoRA (paper, section 3).

    Raises:
        PatError: a field holds a value the method cannot use, or an option of LoRA that does not go with pruning.
    """

    pruning_ratio: float | None = field(
        default=None, metadata={"help": "Share of the hidden size to cut, in (0, 1). Default 0.25."}
    )
    pruned_hidden_size: int | None = field(
        default=None, metadata={"help": "Exact hidden size of the pruned model, instead of a ratio."}
    )
    multiple_of: int | None = field(
        default=None, metadata={"help": "Hard alignment of the pruned hidden size, in channels."}
    )
    operator_rank: int | str | None = field(
        default=None, metadata={"help": "Rank of the operators, 'dense' for full matrices. Default: 5 % of the width."}
    )
    mask: str = field(
        default="trainable", metadata={"help": "'trainable', or 'frozen' (the paper's ablation)."}
    )
    rotation: str = field(
        default="auto",
        metadata={"help": "'auto' rotates into the PCA basis where that is exact, 'pca' insists on it, 'none' does not."},
    )
    milestone: float = field(
        default=1 / 3, metadata={"help": "Share of the optimizer steps after which the mask is 0/1."}
    )
    active_loss_weight: float = field(
        default=1e-3, metadata={"help": "Weight of the active-channel loss (eq. 9)."}
    )
    identity_loss_weight: float = field(
        default=1e-3, metadata={"help": "Weight of the identity loss (eq. 11)."}
    )
    mask_lr_multiplier: float = field(
        default=40.0, metadata={"help": "Learning rate of the mask as a multiple of the trainer's."}
    )
    untie_word_embeddings: bool = field(
        default=False,
        metadata={"help": "Give a tied model an output matrix of its own (adds vocabulary x width parameters)."},
    )
    calibration: str | None = field(
        default=None, metadata={"help": "Text file to compute the rotation from, instead of the training data."}
    )
    calibration_tokens: int | None = field(
        default=None, metadata={"help": "Tokens to compute the rotation from. Default: 8 per hidden channel."}
    )
    gain_tolerance: float = field(
        default=0.15,
        metadata={
            "help": "Tied models rotate only channels whose final gain lies within this relative distance of the median."
        },
    )
    base_shape: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in: shape of the base model the adapter belongs to."}
    )
    resolved_rotation: str | None = field(
        default=None, metadata={"help": "Filled in: what `rotation` came to for this base model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PatType.PAT
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise PatError(f"Got {name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, choices))}.")
        if not 0 <= self.milestone <= 1:
            raise PatError(f"Got milestone={self.milestone}; expected a share of the optimizer steps in [0, 1].")
        if self.pruning_ratio is None and self.pruned_hidden_size is None:
            self.pruning_ratio = DEFAULT_PRUNING_RATIO
        if isinstance(self.operator_rank, str) and self.operator_rank != "dense":
            if not self.operator_rank.isdigit():
                raise PatError(f"Got operator_rank={self.operator_rank!r}; expected a number of ranks or 'dense'.")
            self.operator_rank = int(self.operator_rank)
        for name in ("active_loss_weight", "identity_loss_weight", "mask_lr_multiplier", "gain_tolerance"):
            if getattr(self, name) < 0:
                raise PatError(f"Got {name}={getattr(self, name)}; expected a number that is not negative.")
        if self.layer_replication:
            raise PatError("Got layer_replication, which PAT does not support: replicated layers share their weights.")
