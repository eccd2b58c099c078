"""The rows that the tests of several processes train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "big", "red", "ball", "then", "ran", "home")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety-six short rows; no two of them are the same."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"

    def words(num: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (num,), generator=generator))

    lines = ({"prompt": words(4), "completion": f" {words(4 + number % 9)}"} for number in range(96))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
