"""The scores of a base that a run keeps are read as they were written, or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pat.training.outcome.results import ModelFigures
from pat.training.run.base_scores import BASE_SCORES, BaseScores
from pat.training.run.run_file import RunFile

SCORES = BaseScores(
    "torch.float32",
    ModelFigures(7, 28, held_out_nll=1 / 3, held_out_nll_by_source=[0.1, None], gguf_bytes={"Q8_0": 9}),
    [[0.1 + 0.2, 3.0], [1e-17, 1.0]],
    [[2.5, 256.0]],
    [["ask", "answer"], ["again", ""]],
)


RUN = RunFile({}, "base", "data", tokens="tokens")


def read(folder: Path, dtype: torch.dtype = torch.float32, run: RunFile = RUN) -> BaseScores | None:
    model: Any = SimpleNamespace(dtype=dtype)
    return BaseScores.read(folder, run, model)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert read(folder) is None
    SCORES.write(folder, RUN)
    assert read(folder) == SCORES
    assert torch.equal(SCORES.losses()["base"], torch.tensor([[0.1 + 0.2, 3], [1e-17, 1]], dtype=torch.float64))
    assert read(folder, torch.bfloat16) is None
    assert all(read(folder, run=replace(RUN, **{name: "other"})) is None for name in ("base", "data", "tokens"))
    assert [len(rows) for rows in SCORES.losses().values()] == [2, 1]
    without = replace(SCORES, rows=None, general=None, answers=[])
    without.write(folder, RUN)
    assert read(folder) == without and without.losses() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"figures": {"num_parameters": 7, "num_bytes": 28, "held_out_nll": 0.2}},
        {"rows": [[0.3, 3.0], [0.0, 1.0]]},
        {"rows": 10**400},
        {"answers": [["ask", "another answer"], ["again", ""]]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_what_was_changed_or_torn_is_not_read(change: dict[str, Any], tmp_path: Path) -> None:
    SCORES.write(tmp_path, RUN)
    file = tmp_path / BASE_SCORES
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"scores": stored["scores"] | change}))
    assert read(tmp_path) is None
    file.write_bytes(b"\xff" + file.read_bytes()[:-9])
    assert read(tmp_path) is None
    SCORES.write(tmp_path, RUN)
    assert read(tmp_path) == SCORES
