"""Configuration of a PAT adapter, which has all fields of `LoraConfig` and the method's own."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

from peft import LoraConfig, PeftConfig

from pat.errors import PatError
from pat.kinds import misfits
from pat.shape import AXES, TARGETS, check_request
from pat.tuner.options import PatOptions


class PatType(enum.StrEnum):
    """The one method name this package adds to peft.

    peft looks methods up in dictionaries by a string-valued key, so a string enumeration of our own is enough: it
    equals `"PAT"` in a loaded `adapter_config.json`, hashes alike, and unpickles by importing this module (an extended
    `PeftType` would not unpickle without it). See docs/adr/0002.
    """

    PAT = "PAT"

    def __str__(self) -> str:
        """Return what an enumeration of peft's would, whose status takes the name from behind the point."""
        return f"{type(self).__name__}.{self.name}"


_DECISIVE = (
    "pruning_ratio",
    "axes",
    *(axis.option for axis in AXES.values()),
    "multiple_of",
    "rotation",
    "gain_tolerance",
    "untie_word_embeddings",
)

_WITHOUT_MERGED_FORM = {
    "layer_replication": "replicated layers share their weights",
    "alora_invocation_tokens": "an adapter that acts on some tokens alone cannot be merged into weights",
    "arrow_config": "adapters that a router chooses for each token cannot be merged into weights",
}

_UNREPEATABLE_CHANGES = {
    "pissa_niter_": "subtracts a product drawn at random from the base; use 'pissa'",
    "lora_ga": "subtracts a product of gradients from the base; use 'pissa', 'eva' or none",
    "corda": "subtracts a product of activations from the base; use 'pissa', 'eva' or none",
}
"""Initialisations, by how their names begin, that change the base in a way that no later loading can repeat: the
adapter would be put on another base than it was trained on."""

_REPEATABLE_CHANGES = ("pissa", "olora", "loftq")
"""Initialisations that change the base, in the same way each time an adapter is put on it."""

_PATTERNS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
"""Fields that hold regular expressions, and what peft makes of one before it is looked for. The first two do so where
they are texts; lists of them are names."""

_CHOICES = {
    "mask": ("trainable", "frozen"),
    "rotation": ("auto", "pca", "none"),
    "resolved_rotation": (None, "pca", "none"),
}


@dataclass
class PatConfig(PatOptions, LoraConfig):
    """Configuration of pruning-aware tuning with LoRA (paper, section 3).

    Raises:
        PatError: a field holds a value the method cannot use, or an option of LoRA that does not go with pruning.
    """

    # LoRA's part of the recipe; peft's own defaults are others.
    r: int = field(default=20, metadata={"help": "Rank of LoRA.", "range": "[1, 65536]"})
    lora_alpha: int = field(
        default=10,
        metadata={"help": "Numerator of the factor on LoRA's product.", "range": "(0, inf)", "fractions": True},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA's product.", "range": "[0, 1)"})
    use_rslora: bool = field(
        default=True, metadata={"help": "Whether that factor is lora_alpha / sqrt(r) instead of lora_alpha / r."}
    )
    base_shape: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in: shape of the base model the adapter belongs to."}
    )
    base_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "Filled in: digest of the base's configuration and of a little of each of its tensors, so that a "
            "merge onto other weights of the same shape is refused."
        },
    )
    base_vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Filled in: vocabulary size of the base, where it was trimmed before the adapter was made.",
            "range": "[1, inf)",
        },
    )
    base_quantization: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in: how the base model was quantised when the adapter was made."}
    )
    resolved_width: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Filled in: the sizes chosen. Adapters so outlive a change of the rule."},
    )
    resolved_rotation: str | None = field(
        default=None, metadata={"help": "Filled in: what `rotation` came to for this base model."}
    )
    resolved_from: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Filled in: the options that the other filled-in fields were chosen by. Loading an adapter takes "
            "them as they are; with another option they are chosen anew."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PatType.PAT
        for name, reason in _WITHOUT_MERGED_FORM.items():
            if getattr(self, name):
                raise PatError(f"Got {name}, which PAT does not support: {reason}; leave it out.")
        axes: Any = self.axes
        self.axes = [axes] if isinstance(axes, str) else axes
        # Numbers may be written as texts until their ranges have been checked.
        self._check_kinds(field.name for field in fields(self) if "range" not in field.metadata)
        check_patterns(self)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise PatError(f"Got {name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, choices))}.")
        sizes = self.resolved_width or {}  # adapters of older versions have more on record than sizes
        for size in (sizes[axis.field] for axis in AXES.values() if axis.field in sizes):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise PatError(f"Got resolved_width={self.resolved_width}; expected positive whole numbers.")
        if self.resolved_rotation is not None and "axes" not in (self.resolved_from or {}):
            self.axes = ["hidden"]  # of an adapter that was made when there was no other
            if self.resolved_from is not None:
                self.resolved_from["axes"] = ["hidden"]
        if self.resolved_from is not None:  # maybe of an adapter that was made when there were fewer axes
            self.resolved_from = {axis.option: None for axis in AXES.values()} | self.resolved_from
        check_request(self)
        self._check_kinds(field.name for field in fields(self) if "range" in field.metadata)
        if isinstance(self.operator_rank, str) and self.operator_rank != "dense":
            if not self.operator_rank.isdigit():
                raise PatError(f"Got operator_rank={self.operator_rank!r}; expected a number of ranks or 'dense'.")
            self.operator_rank = int(self.operator_rank)
        for name, reason in _UNREPEATABLE_CHANGES.items():
            if str(self.init_lora_weights).lower().startswith(name):
                raise PatError(
                    f"Got init_lora_weights={self.init_lora_weights!r}, which {reason}. A saved adapter would be put "
                    "on another base than it was trained on."
                )
        if self.resolved_rotation is not None and self.resolved_from is None:  # of an adapter that lacks this record
            self.resolved_from = self.asked()

    def _check_kinds(self, names: Iterable[str]) -> None:
        """Refuse values of another kind than their field's, which peft and torch would fail on where they use them."""
        if (wrong := misfits({name: getattr(self, name) for name in names}, PatConfig)) is not None:
            raise PatError(f"G{wrong[1:]}.")

    def asked(self) -> dict[str, Any]:
        """Return the options that decide on sizes and rotation, as they are now."""
        options: dict[str, Any] = {name: getattr(self, name) for name in _DECISIVE}
        # Adapters that were made when there were no targets have none on record.
        options |= {name: value for name in TARGETS if (value := getattr(self, name)) is not None}
        return options | {"modules_to_save": sorted(self.modules_to_save) if self.modules_to_save else None}

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: of the calibration's file its name alone, since paths are of one machine."""
        saved: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return saved | {"calibration": self.calibration and PurePath(self.calibration).name}

    @property
    def soft_share(self) -> float:
        """Share of the optimizer steps with a soft mask, once the sizes are chosen."""
        sizes, base = self.resolved_width or {}, self.base_shape or {}
        return self.milestone_share(cuts_hidden=sizes["hidden_size"] < base["hidden_size"])

    @property
    def is_resolved(self) -> bool:
        """Whether the filled-in fields were chosen by the options as they are now, as in an adapter that is made."""
        return self.resolved_from == self.asked()


def check_change(config: PatConfig, others: Sequence[PeftConfig], *, empty: bool) -> None:
    """Refuse an initialisation that changes the base where others share it, or where its weights are not looked at.

    Args:
        config: of the adapter that is put on a model.
        others: of the adapters that are on it.
        empty: whether the adapter's parameters are made without values (`low_cpu_mem_usage`).

    Raises:
        PatError: this adapter or one of the others has such an initialisation.
    """
    change = next((kind for one in (config, *others) if (kind := _change_of(one)) is not None), None)
    if change is not None and others:
        raise PatError(
            f"Got a second adapter beside one with init_lora_weights={change!r}, which changes the base that both act "
            "on; merge one first, or use another initialisation (TRL's DPOTrainer adds a second adapter to a model "
            "that has one: give it the base, and the PatConfig as peft_config)."
        )
    if change is not None and empty:
        raise PatError(
            f"Got low_cpu_mem_usage with init_lora_weights={change!r}, which is computed of the base's weights; leave "
            "low_cpu_mem_usage out."
        )


def _change_of(config: PeftConfig) -> str | None:
    kind = getattr(config, "init_lora_weights", None)
    return kind if isinstance(kind, str) and kind.lower() in _REPEATABLE_CHANGES else None


def check_patterns(config: LoraConfig) -> None:
    """Refuse regular expressions that cannot be read, which peft would find out while it goes through the modules.

    Raises:
        PatError: one cannot.
    """
    for name, form in _PATTERNS.items():
        given: Any = getattr(config, name)
        is_several = form != "{}" and isinstance(given, Iterable) and not isinstance(given, str)
        for pattern in given if is_several else [given]:
            try:
                re.compile(form.replace("{}", pattern) if isinstance(pattern, str) else "")
            except (re.error, OverflowError, RecursionError) as error:
                raise PatError(
                    f"Got {name}={pattern[:100]!r}; expected a regular expression, and it is none ({error})."
                ) from error
