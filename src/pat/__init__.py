"""Pruning-Aware Tuning: fine-tune a language model and get it back smaller.

Importing this package registers the PEFT method `PAT`; see the README for the three lines it takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pat.errors import PatError
from pat.registration import register_with_peft

if TYPE_CHECKING:
    from pat.training.callbacks.callback import PatCallback
    from pat.training.distillation.distill import DistillationMixin, Teacher
    from pat.training.tune import tune
    from pat.tuner.config import PatConfig

__version__ = "0.1.0"

__all__ = ["DistillationMixin", "PatCallback", "PatConfig", "PatError", "Teacher", "tune"]

_HOMES = {
    "DistillationMixin": "pat.training.distillation.distill",
    "PatCallback": "pat.training.callbacks.callback",
    "PatConfig": "pat.tuner.config",
    "Teacher": "pat.training.distillation.distill",
    "tune": "pat.training.tune",
}

register_with_peft()

if not TYPE_CHECKING:  # or every name would be taken for one of this package's

    def __getattr__(name: str) -> object:
        """Import what a public name needs when it is asked for; see docs/adr/0012."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
