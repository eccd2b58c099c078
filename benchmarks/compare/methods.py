"""What is compared: how each method tunes, how it prunes, and in which order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

Order = Literal["", "FT", "P→FT", "FT→P", "PAT"]

PAPER: dict[str, Any] = {
    "axes": ["hidden"],
    "rotation": "none",
    "milestone": 1 / 3,
    "operator_lr_multiplier": 1.0,
    "no_compact": True,
}
"""The paper's method, under the comparison's own budget, rank and learning rates; those of its mask are the
comparison's `mask_lr_multiplier` times as high."""


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    label: str
    order: Order
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Flags of `pat tune` that win over the comparison's own."""
    of_paper: bool = False
    """Whether its recipe is the paper's."""
    baseline: str | None = None
    """Name of the way to prune among the baselines, where it is not PAT that prunes."""
    trims_vocabulary: bool = False
    """Whether a quarter of the tokens go, and so fewer of the other parameters."""
    has_teacher: bool = False
    """Whether it learns from LoRA's tuned model, too."""

    @property
    def prunes(self) -> bool:
        """Whether there is a result for each ratio."""
        return self.order in ("P→FT", "FT→P", "PAT")

    @property
    def name_with_order(self) -> str:
        """Its label, and the order where a method is there in several."""
        return self.label + (f" ({self.order})" if self.order in ("P→FT", "FT→P") else "")

    @property
    def trains(self) -> bool:
        """Whether there is a learning rate of its own to be searched."""
        return self.order in ("FT", "P→FT", "PAT")

    @property
    def needs_tuned(self) -> bool:
        """Whether LoRA's tuned model of the same seed has to be there: to be pruned, or to teach."""
        return self.order == "FT→P" or self.has_teacher


METHODS: dict[str, Method] = {
    "base": Method("Untuned", ""),
    "lora": Method("LoRA", "FT"),
    "dora": Method("DoRA", "FT", {"use_dora": True}),
    "llm_pruner": Method("LLM-Pruner", "P→FT", baseline="llm_pruner"),
    "llm_pruner_after": Method("LLM-Pruner", "FT→P", baseline="llm_pruner"),
    "llm_pruner_published": Method("LLM-Pruner as published", "P→FT", baseline="llm_pruner_published"),
    "slicegpt": Method("SliceGPT", "P→FT", baseline="slicegpt"),
    "slicegpt_after": Method("SliceGPT", "FT→P", baseline="slicegpt"),
    "minitron": Method("Minitron", "P→FT", baseline="minitron", has_teacher=True),
    "minitron_ce": Method("Minitron, no teacher", "P→FT", baseline="minitron"),
    "shortgpt": Method("ShortGPT", "P→FT", baseline="shortgpt"),
    "magnitude": Method("Magnitude channels", "P→FT", baseline="magnitude"),
    "random": Method("Random channels", "P→FT", baseline="random"),
    "pat": Method("PAT", "PAT"),
    "pat_heads": Method("PAT, heads as well", "PAT", {"axes": ["mlp", "heads"]}),
    "pat_hidden": Method("PAT, hidden size alone", "PAT", {"axes": ["hidden"]}),
    "pat_vocabulary": Method("PAT, 3/4 of the vocabulary", "PAT", trims_vocabulary=True),
    "pat_no_refit": Method("PAT, without refit", "PAT", {"refit": False}),
    "pat_milestone_fiftieth": Method("PAT, milestone 0.02", "PAT", {"milestone": 0.02}),
    "pat_milestone_tenth": Method("PAT, milestone 0.1", "PAT", {"milestone": 0.1}),
    "pat_milestone_third": Method("PAT, milestone 1/3", "PAT", {"milestone": 1 / 3}),
    "pat_dora": Method("PAT + DoRA", "PAT", {"use_dora": True}),
    "pat_full_width": Method("PAT, no compaction", "PAT", {"no_compact": True}),
    "pat_paper": Method("PAT, paper's recipe", "PAT", PAPER, of_paper=True),
    "pat_paper_frozen_mask": Method("PAT, paper's, frozen mask", "PAT", {**PAPER, "mask": "frozen"}, of_paper=True),
    "pat_paper_no_identity": Method(
        "PAT, paper's, without identity loss", "PAT", {**PAPER, "identity_loss_weight": 0.0}, of_paper=True
    ),
}

PAT_REVISION = 3
"""Raised when the same options come to another model: 2 chooses MLP channels by elimination instead of by energy, 3
matches the rank of LoRA on the small model instead of before the milestone."""


OF_THE_COMPARISON = ("learning_rate", "max_length", "num_train_epochs", "per_device_train_batch_size")
"""Options of a recipe that every comparison sets for all methods, so that their defaults decide nothing."""


def decisive(name: str) -> dict[str, Any]:
    """Return what decides a method's figures beside a comparison's settings, as JSON: of PAT its defaults, too."""
    method = METHODS[name]
    facts: dict[str, Any] = {"order": method.order, "has_teacher": method.has_teacher, **method.flags}
    if method.order == "PAT":
        from pat.recipes import recipe_defaults
        from pat.tuner.options import PatOptions

        facts = {"revision": PAT_REVISION, **asdict(PatOptions()), **recipe_defaults("default"), **facts}
        facts = {option: value for option, value in facts.items() if option not in OF_THE_COMPARISON}
    return cast(dict[str, Any], json.loads(json.dumps(facts)))


def outdated(row: Mapping[str, Any]) -> str | None:
    """Return in what a row's method was another one when it was run, None if in nothing."""
    name, then = row["cell"]["method"], row["identity"].get("method")
    if name not in METHODS:
        return "no longer there"
    now = decisive(name)
    if then is None:
        return "with which ones is not on record"
    keys = {**then, **now}.keys() - {*OF_THE_COMPARISON}  # which older rows keep
    differing = sorted(key for key in keys if then.get(key) != now.get(key))
    return ", ".join(f"{key}={then.get(key)}, now {now.get(key)}" for key in differing) or None


TUNED = "lora"
"""The method whose tuned models are what FT→P prunes, and what teaches."""
