"""What is kept of a base is taken over as it was, or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pat.training.base_scores import BASE_SCORES, BaseScores
from pat.training.results import ModelFigures

SCORES = BaseScores(
    "torch.float32",
    ModelFigures(7, 28, held_out_nll=1 / 3, held_out_nll_by_source=[0.1, None], gguf_bytes={"Q8_0": 9}),
    [[0.1 + 0.2, 3.0], [1e-17, 1.0]],
    [["ask", "answer"], ["again", ""]],
)


def read(folder: Path, dtype: torch.dtype = torch.float32, num_rows: int = 2) -> BaseScores | None:
    model: Any = SimpleNamespace(dtype=dtype)
    data: Any = SimpleNamespace(held_out=[None] * num_rows)
    return BaseScores.read(folder, model, data)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert read(folder) is None
    SCORES.write(folder)
    assert read(folder) == SCORES
    assert torch.equal(SCORES.losses()["base"], torch.tensor([[0.1 + 0.2, 3], [1e-17, 1]], dtype=torch.float64))
    assert read(folder, torch.bfloat16) is None and read(folder, num_rows=3) is None
    without = replace(SCORES, rows=None, answers=[])
    without.write(folder)
    assert read(folder, num_rows=0) == without and without.losses() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [[1.0], [2.0, 3.0]]},
        {"rows": [[1.0, 1.0], [float("nan"), 1.0]]},
        {"answers": None},
        {"answers": [["ask"]]},
        {"figures": {"num_parameters": 1}},
        {"figures": {"num_parameters": 1, "num_bytes": 2, "held_out_nll": "low"}},
        {"figures": [1, 2]},
        {"unknown": 1},
    ],
)
def test_what_is_not_whole_is_not_read(change: dict[str, Any], tmp_path: Path) -> None:
    SCORES.write(tmp_path)
    file = tmp_path / BASE_SCORES
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert read(tmp_path) is None
    file.write_bytes(b"\xff" + file.read_bytes()[:-9])
    assert read(tmp_path) is None
    SCORES.write(tmp_path)
    assert read(tmp_path) == SCORES
