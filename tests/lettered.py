"""A checkpoint that answers questions by letter, which stories260K never does."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SWAPPED = {"A": "H", "B": "W", "C": "O", "D": "▁The"}
"""Letters, and the tokens with which stories260K begins its answers."""


def save_lettered(stories260k_path: Path, folder: Path) -> Path:
    """Save stories260K with an output matrix of its own, in which letters have changed places with frequent tokens."""
    model = AutoModelForCausalLM.from_pretrained(stories260k_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stories260k_path)
    pairs = [tuple(tokenizer.convert_tokens_to_ids([letter, token])) for letter, token in SWAPPED.items()]
    order = torch.arange(model.config.vocab_size)
    for letter, token in pairs:
        order[[letter, token]] = order[[token, letter]]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach()[order].clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
