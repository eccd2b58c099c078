"""Flags, ready-made comparisons, and what is refused at once."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from compare.cells import done_cells, num_missing
from compare.command import main
from compare.config import CompareConfig
from compare.results import read_rows
from compare.runner import default_threads
from compare.summary import summarise
from compare.tables import markdown

from pat.errors import PatError
from pat.options import OptionsParser

ROOT = Path(__file__).resolve().parents[3]

CONFIGS = sorted((ROOT / "benchmarks" / "compare" / "configs").glob("*.yaml"))

RECORDED = sorted(path.parent.name for path in (ROOT / "docs" / "comparisons").glob("*/config.yaml"))

SETTINGS: dict[str, Any] = {
    "models": ["models/small"],
    "data": "rows.jsonl",
    "methods": ["base", "lora", "slicegpt", "slicegpt_after", "pat"],
    "ablations": ["random"],
    "ratios": [0.25, 0.5],
    "output_dir": Path("out"),
    "steps": 3,
}


def parse(*argv: str) -> CompareConfig:
    return OptionsParser("compare", CompareConfig).parse(argv)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_made_comparisons_are_sound_and_typed_flags_win(path: Path) -> None:
    config = parse("--config", str(path))
    assert "pat" in config.methods and "lora" in config.methods
    typed = parse("--config", str(path), "--seeds", "3,4", "--methods", "lora", "pat", "--ablations", "random")
    assert typed.seeds == [3, 4] and typed.methods == ["lora", "pat"]
    expected = dataclasses.replace(config, seeds=[3, 4], methods=["lora", "pat"], ablations=["random"])
    assert typed == expected


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_comparisons_are_drawn_as_they_lie_there(name: str) -> None:
    folder = ROOT / "docs" / "comparisons" / name
    config = parse("--config", str(folder / "config.yaml"), "--output_dir", str(folder))
    rows = read_rows(config)
    table = markdown(config, summarise(config, rows), num_missing(config, done_cells(rows)))
    assert table == (folder / "results.md").read_text(encoding="utf-8")


def test_a_comparison_is_drawn_anew_without_being_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "docs" / "comparisons" / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "results.md").unlink()
    argv = ["--config", str(ROOT / "docs/comparisons/tiny/config.yaml"), "--models", "nowhere/stories260K"]
    assert main([*argv, "--output_dir", str(tmp_path / "tiny"), "--redraw"]) == 0
    expected = (ROOT / "docs" / "comparisons" / "tiny" / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "tiny" / "results.md").read_text(encoding="utf-8") == expected
    assert expected in capsys.readouterr().out


def test_identity_is_what_decides_a_cells_figures() -> None:
    config = CompareConfig(**SETTINGS | {"data_dir": Path("here/tasks"), "tasks": ["piqa", "rte"]})
    identity = config.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["tasks"], identity["data_dir"]) == ("piqa,rte", "tasks")
    for same in ({"workers": 3}, {"seeds": [5]}, {"data": "there/rows.jsonl"}, {"data_dir": Path("there/tasks")}):
        assert dataclasses.replace(config, **same).identity() == identity
    for other in ({"steps": 4}, {"rank": 8}, {"tasks": ["piqa"]}, {"limit": 5}):
        assert dataclasses.replace(config, **other).identity() != identity


def test_without_tasks() -> None:
    assert CompareConfig(**SETTINGS | {"tasks": ["none"]}).tasks is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods": ["slicegpt_after"]}, "lora"),
        ({"ablations": ["lora"]}, "does not prune"),
        ({"ratios": [0.25, 1.5]}, "1.5"),
        ({"ablation_ratio": 0.3}, "0.3"),
        ({"steps": None}, "--steps or --epochs"),
        ({"epochs": 2}, "--steps or --epochs"),
        ({"steps": 0}, "steps=0"),
        ({"steps": None, "epochs": 0.0}, "epochs=0"),
        ({"rows": -1}, "rows=-1"),
        ({"learning_rates": [1e-3, 0.0]}, "learning rates"),
        ({"methods": []}, "no methods"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [-1]}, "seed -1"),
    ],
)
def test_what_cannot_be_compared_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(PatError, match=message):
        CompareConfig(**SETTINGS | overrides)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "lora"], "--models is missing"),
        (["--config", "tinny"], "no such file"),
        (["--config", str(CONFIGS[-1]), "--methods", "prune_it"], "'prune_it'"),
        (["--config", str(CONFIGS[-1]), "--seeds", "0,one"], "a whole number"),
        (["--config", str(CONFIGS[-1]), "--colour", "red"], "--colour"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_threads_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(2) == 4 and default_threads(16) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads(2) == 3
