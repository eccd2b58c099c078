"""Pruning-Aware Tuning: fine-tune a language model and get it back smaller."""

__version__ = "0.1.0"
