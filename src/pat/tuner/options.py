"""The method's own options: one place for names, defaults and help, shared by `PatConfig` and the command line.

The defaults are the recipe that came out best in our comparisons; `recipes/paper.yaml` holds the paper's instead.
"""

from dataclasses import dataclass, field

from pat.shape import ShapeOptions

SOFT_SHARE = 0.02
"""Default milestone where the hidden size is cut. On the other axes every step of a soft mask was one that the small
model lacked (docs/experiments.md)."""


@dataclass
class PatOptions(ShapeOptions):
    """Options that pruning-aware tuning adds to a LoRA configuration."""

    operator_rank: int | str | None = field(
        default=None,
        metadata={"help": "Rank of the operators, or 'dense'. Default: a twentieth of the width.", "range": "[1, inf)"},
    )
    mask: str = field(default="trainable", metadata={"help": "'trainable', or 'frozen' (the paper's ablation)."})
    rotation: str = field(
        default="auto",
        metadata={
            "help": "'auto' rotates into the PCA basis where that is exact, 'pca' insists on it, 'none' does not."
        },
    )
    milestone: float | None = field(
        default=None,
        metadata={
            "help": "Share of the optimizer steps after which the mask is 0/1 (the paper: 1/3). Default: 0.02 where "
            "the hidden size is cut; else 0, which trains the small model from the first step.",
            "range": "[0, 1]",
        },
    )
    active_loss_weight: float = field(
        default=1e-3, metadata={"help": "Weight of the active-channel loss (eq. 9).", "range": "[0, inf)"}
    )
    identity_loss_weight: float = field(
        default=1e-3, metadata={"help": "Weight of the identity loss (eq. 11).", "range": "[0, inf)"}
    )
    mask_lr_multiplier: float = field(
        default=40.0,
        metadata={"help": "Learning rate of the mask as a multiple of the trainer's.", "range": "[0, inf)"},
    )
    operator_lr_multiplier: float = field(
        default=30.0,
        metadata={"help": "Learning rate of the operators' v as a multiple of the trainer's.", "range": "[0, inf)"},
    )
    refit: bool = field(
        default=True,
        metadata={
            "help": "Fit the output matrix of each MLP, or attention, anew to the channels that stay, on the base "
            "model's activations; false drops the others without replacement."
        },
    )
    refit_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens to choose those channels by, and to fit the matrices on. Default: 16 per channel before "
            "such a matrix.",
            "range": "[1, inf)",
        },
    )
    calibration: str | None = field(
        default=None, metadata={"help": "Text file to compute the rotation from, instead of the training data."}
    )
    calibration_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens to compute the rotation from. Default: 4 per hidden channel.", "range": "[1, inf)"},
    )
    gain_tolerance: float = field(
        default=0.15,
        metadata={
            "help": "Tied models rotate only channels whose final gain lies this close (relative) to the median.",
            "range": "[0, inf)",
        },
    )

    def milestone_share(self, *, cuts_hidden: bool) -> float:
        """Return the share of the optimizer steps with a soft mask, in [0, 1].

        Args:
            cuts_hidden: whether the hidden size is cut, on which the default depends.
        """
        if self.milestone is None:
            return SOFT_SHARE if cuts_hidden else 0.0
        return self.milestone
