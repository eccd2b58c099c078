"""Baselines to compare PAT with: clean-room, small, each in one module; `prune` is the one way to call them.

A baseline takes a base model and a number of parameters and gives back a smaller model that runs, trains with LoRA, and
says how many parameters it really has. LoRA-r and DoRA-r themselves need no module: they are peft's.
"""

from .budget import num_parameters, pat_parameters
from .calibration import calibration_sequences
from .registry import CALIBRATED, METHODS, Pruned, check, prune

__all__ = [
    "CALIBRATED",
    "METHODS",
    "Pruned",
    "calibration_sequences",
    "check",
    "num_parameters",
    "pat_parameters",
    "prune",
]
