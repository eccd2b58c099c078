"""The 14 tasks through two command lines: `pat evaluate` and stock `lm_eval` give the same figures."""

import json
import sys
from pathlib import Path

import pytest
from lm_eval.__main__ import cli_evaluate

from pat.cli import main
from pat.evaluation.harness import METRICS, TASK_FILES
from pat.questions import TASKS


@pytest.mark.slow
def test_stock_lm_eval_measures_the_same_to_the_last_digit(
    lettered_path: Path, tests_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir, batch_size = tests_data / "tasks", "8"
    ours = ["evaluate", "--model", str(lettered_path), "--tasks", "paper", "--data_dir", str(data_dir)]
    assert main([*ours, "--batch_size", batch_size, "--output", str(tmp_path / "pat.json")]) == 0
    theirs = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={lettered_path}", "--batch_size", batch_size]
    theirs += ["--tasks", "pat_paper_letter,pat_paper_likelihood", "--include_path", str(TASK_FILES), "--device", "cpu"]
    theirs += ["--metadata", json.dumps({"data_dir": str(data_dir)}), "--output_path", str(tmp_path / "stock.json")]
    monkeypatch.setattr(sys, "argv", theirs)
    cli_evaluate()

    figures = json.loads((tmp_path / "pat.json").read_text(encoding="utf-8"))["tasks"]
    (file,) = tmp_path.glob("stock_*.json")
    stock = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert len(figures["scores"]) == 2 * len(TASKS)
    for score in figures["scores"]:
        found = stock[f"pat_{score['task']}_{score['protocol']}"]
        assert score["num_questions"] == found["sample_len"]
        for metric in (*METRICS, "acc_stderr", "acc_norm_stderr"):
            assert score[metric] == found.get(f"{metric},none"), (score["task"], score["protocol"], metric)
    for protocol in ("letter", "likelihood"):
        group = stock[f"pat_paper_{protocol}"]
        for metric in METRICS:
            assert figures["mean"][protocol][metric] == group.get(f"{metric},none")
        assert figures["mean_stderr"][protocol]["acc"] == pytest.approx(group["acc_stderr,none"], rel=1e-15)
    assert 0.0 < figures["mean"]["letter"]["no_letter"] < 0.5  # a model that says no letters shows nothing
