"""A small instruction set written for this package, and the prompts that compare two models side by side."""

from importlib.resources import files
from pathlib import Path

SAMPLE_PROMPTS: tuple[str, ...] = (
    "How many days are there in a week?",
    "Name three primary colors.",
    "Explain in one sentence why plants need sunlight.",
    "Give me three tips for staying healthy.",
    "Write one sentence about a friendly dog.",
    "List three things you need to bake bread.",
)
"""One user turn each, none of them in the instruction set. SmolLM2-135M-Instruct answers all six sensibly
(greedy, through its chat template), so that what pruning costs is visible."""


def demo_data_path() -> Path:
    """Return the instruction set: JSON lines with `instruction`, `input` (may be empty) and `output`."""
    return Path(str(files(__name__) / "instructions.jsonl"))
