"""Pruning-Aware Tuning: fine-tune a language model and get it back smaller.

Importing this package registers the PEFT method `PAT`; see the README for the three lines it takes.
"""

__version__ = "0.1.0"

from pat.errors import PatError
from pat.training.callback import PatCallback
from pat.training.tune import tune
from pat.tuner import PatConfig

__all__ = ["PatCallback", "PatConfig", "PatError", "tune"]
