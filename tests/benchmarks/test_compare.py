"""`pat compare` from nothing to table and figures on a tiny model; cut off and started again it repeats nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from compare.cells import Cell
from compare.command import main
from compare.config import make_config
from compare.data import prepare_data
from compare.load_baselines import default_folder
from compare.prepare import prepare
from compare.run_cell import round_weights, run_cell
from tiny_models import build, tiny_tokenizer
from transformers import Trainer

from pat.checkpoint.staging import lock_folder
from pat.errors import ParityMissed
from pat.loading import load_tokenizer

pytestmark = pytest.mark.slow

METHODS = ["base", "lora", "llm_pruner", "slicegpt_after", "random", "pat"]

NUM_RESULTS = 1 + 2 + 4 * 2
NUM_SEARCHED = 4 * 2  # LoRA, LLM-Pruner, random, PAT


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: `compare.yaml` and `out`."""
    root = tmp_path_factory.mktemp("compare")
    build("llama", tied=True).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i * i}"} for i in range(60)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings: dict[str, Any] = {
        "models": str(root / "base"),
        "data": str(root / "rows.jsonl"),
        "output_dir": str(root / "out"),
        "methods": METHODS,
        "ratios": [0.25],
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "rank": 4,
        "steps": 3,
        "search_steps": 2,
        "batch_size": 2,
        "max_length": 64,
        "held_out": 6,
        "validation": 4,
        "template": "auto",
        "tasks": "none",
        "calibration_rows": 8,
        "workers": 2,
        "threads": 1,
    }
    (root / "compare.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["--config", str(root / "compare.yaml")]) == 0
    return root


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_cell_has_its_figures(compared: Path) -> None:
    rows = rows_of(compared / "out")
    results = [row for row in rows if not row["cell"]["search"]]
    assert len(results) == NUM_RESULTS and len(rows) == NUM_RESULTS + NUM_SEARCHED
    assert all(row["held_out_nll"] > 0 and row["num_held_out_tokens"] > 0 for row in results)
    by_method = {row["cell"]["method"]: row for row in results}
    whole, target = by_method["base"]["num_parameters"], by_method["random"]["target_parameters"]
    assert by_method["lora"]["num_parameters"] == whole
    assert by_method["pat"]["num_parameters"] == by_method["random"]["num_parameters"] == target < whole
    # Trained parameters are LoRA's, to half a rank.
    budget = by_method["lora"]["num_trainable"]
    assert by_method["random"]["trainable_budget"] == by_method["pat"]["trainable_budget"] == budget
    for name in ("random", "pat"):
        assert abs(by_method[name]["num_trainable"] / budget - 1) < 0.5 / by_method[name]["rank"] + 0.01, name


def test_what_it_leaves(compared: Path) -> None:
    out = compared / "out"
    assert {path.name for path in out.iterdir()} >= {"results.jsonl", "results.md", "nll.png", "data"}
    assert not (out / "tuned").exists() and not (out / "work").exists()
    table = (out / "results.md").read_text(encoding="utf-8")
    assert "| 25.0% | PAT | PAT |" in table and "| 25.0% | SliceGPT | FT→P |" in table and "Missing" not in table


def test_cells_that_are_not_asked_for_are_said_to_be_there(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(compared / "out", tmp_path / "out")
    few = ["--methods", "base", "lora", "--output_dir", str(tmp_path / "out")]
    assert main(["--config", str(compared / "compare.yaml"), *few]) == 0
    # Four methods with two seeds, and the searches of three of them.
    assert f"does not show: {4 * 2 + 3 * 2}, of other models" in caplog.text


def test_interrupted_it_leaves_a_table_and_says_how_to_go_on(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    shutil.copytree(compared / "out", tmp_path / "out")
    (tmp_path / "out" / "results.md").unlink()
    monkeypatch.setattr("compare.command.run_cells", interrupted)
    command = ["--config", str(compared / "compare.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 130
    assert "the same command goes on from there" in caplog.text
    assert "| PAT | PAT |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_rows_that_are_cut_off_are_said(compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"say {i} " * (1 if i % 2 else 40), "completion": "it is"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--data", str(tmp_path / "rows.jsonl"), "--methods", "base", "--output_dir", str(tmp_path / "out")]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 0
    assert "have no response left within --max_length 64" in caplog.text and "of 6 to report on" in caplog.text


def test_started_again_it_repeats_nothing(compared: Path) -> None:
    before = (compared / "out" / "results.jsonl").read_bytes()
    assert main(["--config", str(compared / "compare.yaml")]) == 0
    assert (compared / "out" / "results.jsonl").read_bytes() == before


def test_cut_off_it_goes_on_and_comes_to_the_same_figures(compared: Path, tmp_path: Path) -> None:
    whole = rows_of(compared / "out")
    out = tmp_path / "out"
    shutil.copytree(compared / "out" / "data", out / "data")
    kept = [row for row in whole if row["cell"]["search"] or row["cell"]["method"] in ("pat", "random", "llm_pruner")]
    lines = [json.dumps(row) for row in kept]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:40], encoding="utf-8")
    assert main(["--config", str(compared / "compare.yaml"), "--output_dir", str(out), "--workers", "1"]) == 0
    text = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert text[: len(kept)] == lines
    again = {json.dumps(row["cell"]): row.get("held_out_nll") for row in map(json.loads, text[len(kept) + 1 :])}
    expected = {json.dumps(row["cell"]): row.get("held_out_nll") for row in whole if row not in kept}
    assert again == pytest.approx(expected, abs=1e-6)


def test_killed_it_leaves_no_worker_and_repeats_no_finished_cell(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--config", str(compared / "compare.yaml"), "--output_dir", str(out)]
    process = psutil.Popen(
        [sys.executable, "-m", "pat", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not (out / "results.jsonl").is_file() or len(rows_of(out)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = process.children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    before = (out / "results.jsonl").read_text(encoding="utf-8")
    assert main(command) == 0
    assert (out / "results.jsonl").read_text(encoding="utf-8").startswith(before)
    cells = [json.dumps(row["cell"]) for row in rows_of(out)]
    assert len(cells) == len(set(cells)) == NUM_RESULTS + NUM_SEARCHED


def test_two_do_not_share_a_folder(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = lock_folder(tmp_path)
    assert lock is not None
    try:
        code = main(["--config", str(compared / "compare.yaml"), "--output_dir", str(tmp_path)])
    finally:
        os.close(lock)
    assert code == 2 and "another comparison is running there" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_every_method_is_measured_at_the_precision_of_the_checkpoint() -> None:
    linear = torch.nn.Linear(3, 3)
    exact = linear.weight.detach().clone()
    round_weights(linear, None)
    assert torch.equal(linear.weight, exact)
    round_weights(linear, torch.bfloat16)
    assert linear.weight.dtype == torch.float32 and not torch.equal(linear.weight, exact)
    assert torch.equal(linear.weight, exact.bfloat16().float())


def test_a_rate_that_diverges_is_not_taken(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rates = ["--methods", "lora", "--seeds", "0", "--learning_rates", "1e30", "1e-3", "--output_dir", str(out)]
    assert main(["--config", str(compared / "compare.yaml"), *rates]) == 0
    by_rate = {row["cell"]["learning_rate"]: row for row in rows_of(out) if row["cell"]["search"]}
    assert by_rate[1e30]["validation_nll"] is None
    assert [row["cell"]["learning_rate"] for row in rows_of(out) if not row["cell"]["search"]] == [1e-3]


def test_a_rate_can_be_added_to_the_search(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    before = (out / "results.jsonl").read_text(encoding="utf-8")
    rates = ["--learning_rates", "1e-9", "1e-3", "1e-2", "--output_dir", str(out)]
    assert main(["--config", str(compared / "compare.yaml"), *rates]) == 0
    assert (out / "results.jsonl").read_text(encoding="utf-8").startswith(before)
    new = [row["cell"] for row in rows_of(out)[len(before.splitlines()) :]]
    assert len(new) == 4 and {cell["learning_rate"] for cell in new if cell["search"]} == {1e-9}


def test_results_that_diverge_are_results_and_not_tried_again(
    compared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--methods", "base", "lora", "slicegpt_after", "pat", "--seeds", "0", "--learning_rates", "1e30"]
    command = ["--config", str(compared / "compare.yaml"), *options, "--output_dir", str(out)]
    assert main(command) == 0
    assert capfd.readouterr().out.startswith("# Comparison")  # workers keep silent
    figures = {row["cell"]["method"]: row["held_out_nll"] for row in rows_of(out)}
    assert figures.pop("base") > 0 and figures == {"lora": None, "slicegpt_after": None, "pat": None}
    assert (out / "results.md").read_text(encoding="utf-8").count("(1 of 1 diverged)") == 3
    before = (out / "results.jsonl").read_bytes()
    assert main(command) == 0
    assert (out / "results.jsonl").read_bytes() == before


def test_a_rate_whose_merge_is_refused_is_not_taken_and_a_result_says_so(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(arguments: Any) -> Any:
        raise ParityMissed("not the tuned model")

    settings = yaml.safe_load((compared / "compare.yaml").read_text(encoding="utf-8"))
    config = make_config(settings | {"output_dir": str(tmp_path)})
    prepare(config)
    monkeypatch.setattr("compare.run_cell.run_tune", refuse)
    row = run_cell(config, Cell("base", "pat", 0.25, 0, 1e-3, search=True), None)
    assert row["validation_nll"] is None and row["diverged"] == "not the tuned model"
    with pytest.raises(ParityMissed):
        run_cell(config, Cell("base", "pat", 0.25, 0, 1e-3), None)


def test_somebody_elses_folder_is_left_alone(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine", encoding="utf-8")
    for models in (str(compared / "base"), str(tmp_path / "nothing")):
        options = ["--models", models, "--methods", "base", "--output_dir", str(tmp_path)]
        assert main(["--config", str(compared / "compare.yaml"), *options]) == 2
        assert "holds files, but no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.txt"]


def test_other_baselines_do_not_go_on_with_a_comparison(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, baselines = tmp_path / "out", tmp_path / "baselines"
    shutil.copytree(compared / "out", out)
    found = default_folder()
    assert found is not None
    shutil.copytree(found, baselines)
    command = ["--config", str(compared / "compare.yaml"), "--output_dir", str(out)]
    command += ["--baselines", str(baselines)]
    assert main(command) == 0  # from elsewhere they are the same
    with (baselines / "slicegpt.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert main(command) == 2
    assert "with other baselines" in capsys.readouterr().err
    assert main([*command, "--methods", "base", "lora", "pat"]) == 0  # which use none


def test_what_a_comparison_does_not_use_cannot_fail_it(compared: Path, tmp_path: Path) -> None:
    command = ["--config", str(compared / "compare.yaml"), "--seeds", "0", "--learning_rates", "1e-3"]
    unused = ["--calibration_rows", "1000", "--methods", "random", "--output_dir", str(tmp_path / "random")]
    assert main([*command, *unused]) == 0
    same_width = ["--ratios", "0.25", "0.26", "--methods", "base", "lora", "--output_dir", str(tmp_path / "lora")]
    assert main([*command, *same_width]) == 0


def test_data_of_other_settings_are_not_taken_for_ones_own(compared: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((compared / "compare.yaml").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(settings["models"])
    files = prepare_data(make_config(settings), tokenizer, tmp_path)
    written = files.train.stat().st_mtime_ns
    assert prepare_data(make_config(settings), tokenizer, tmp_path).train.stat().st_mtime_ns == written
    prepare_data(make_config(settings | {"rows": 7}), tokenizer, tmp_path)
    assert len(files.train.read_text(encoding="utf-8").splitlines()) == 7


def test_wrong_tasks_are_found_before_anything_is_trained(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "piqa", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 2
    assert "piqa.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()


def fake_baselines(tmp_path: Path, prune: str) -> Path:
    """A folder of baselines whose every method does this instead of pruning."""
    folder = tmp_path / "baselines"
    folder.mkdir()
    code = [
        "import os, signal",
        "CALIBRATED = ()",
        "def check(*args): ...",
        "def calibration_sequences(*args, **kwargs): ...",
        f"def prune(*args, **kwargs): {prune}",
    ]
    (folder / "__init__.py").write_text("\n".join(code), encoding="utf-8")
    return folder


def test_a_failing_cell_does_not_stop_the_others(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = fake_baselines(tmp_path, "raise ValueError('no luck')")
    options = ["--methods", "base", "random", "--output_dir", str(tmp_path / "out"), "--baselines", str(baselines)]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 1
    assert "ValueError: no luck" in capsys.readouterr().err
    assert [row["cell"]["method"] for row in rows_of(tmp_path / "out") if "failed" not in row] == ["base"]
    assert "Untuned" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_a_worker_that_is_killed_costs_its_cells_only(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = fake_baselines(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    options = ["--methods", "random", "base", "--output_dir", str(tmp_path / "out"), "--baselines", str(baselines)]
    options += ["--workers", "1"]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 1
    assert "worker process died" in capsys.readouterr().err
    assert [row["cell"]["method"] for row in rows_of(tmp_path / "out") if "failed" not in row] == ["base"]


def test_other_data_under_the_same_name_are_refused_and_nothing_is_lost(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = tmp_path / "rows.jsonl"
    text = (compared / "rows.jsonl").read_text(encoding="utf-8")
    other.write_text(text.replace("say 7 ", "say so "), encoding="utf-8")
    command = ["--config", str(compared / "compare.yaml"), "--output_dir", str(out), "--data", str(other)]
    assert main(command) == 2
    assert "gives other rows" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    other.write_text(text, encoding="utf-8")  # the same rows from elsewhere are the same
    assert main(command) == 0


def test_another_model_under_the_same_name_is_refused(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared / "out", tmp_path / "out")
    build("llama", tied=True, seed=5).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = ["--output_dir", str(tmp_path / "out"), "--models", str(tmp_path / "base")]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 2
    assert "with other model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "methods", "said"),
    [
        ("phi3", ["llm_pruner"], "LLM-Pruner"),
        ("gemma2", ["slicegpt"], "SliceGPT"),
        ("llama", ["llm_pruner"], "--calibration_rows"),
    ],
)
def test_what_cannot_be_run_is_found_before_anything_is_trained(
    family: str, methods: list[str], said: str, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(family, tied=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = ["--models", str(tmp_path / "base"), "--methods", *methods, "--output_dir", str(tmp_path / "out")]
    if said == "--calibration_rows":
        options += ["--calibration_rows", "1000"]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pat_and_lora_see_the_same_rows_in_the_same_order(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    step = Trainer.training_step

    def recorded(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", recorded)
    settings = yaml.safe_load((compared / "compare.yaml").read_text(encoding="utf-8"))
    config = make_config(settings | {"output_dir": str(tmp_path), "learning_rates": [1e-3], "steps": 4})
    prepare(config)
    orders = []
    for cell in (Cell("base", "lora", 0.0, 1, 1e-3), Cell("base", "pat", 0.25, 1, 1e-3)):
        seen.clear()
        assert run_cell(config, cell, None)["held_out_nll"] > 0
        orders.append(list(seen))
    assert len(orders[0]) == 4 and orders[0] == orders[1]
    assert len({str(batch) for batch in orders[0]}) == 4


def test_accuracies_are_measured_of_whole_sliced_and_small_models(compared: Path, tmp_path: Path) -> None:
    choices = ["seven", "eight"]
    rows = [
        {"stem": f"say {i}", "choices": choices, "answer": i % 2, "prompt": f"say {i} A. seven B. eight"}
        for i in range(6)
    ]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--tasks", "piqa", "--data_dir", str(tmp_path), "--protocols", "letter", "likelihood", "--seeds", "0"]
    options += [
        "--methods",
        "base",
        "slicegpt",
        "pat",
        "--learning_rates",
        "1e-3",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["--config", str(compared / "compare.yaml"), *options]) == 0
    for row in rows_of(tmp_path / "out"):
        scores = {score["protocol"]: score for score in row["tasks"]["scores"]}
        assert scores.keys() == {"letter", "likelihood"} and scores["likelihood"]["num_questions"] == 6
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "Accuracy, letter (%)" in table and "Accuracy, likelihood, normalised (%)" in table
    assert "accuracy by task, likelihood" in table and "| piqa |" in table
    assert (tmp_path / "out" / "accuracy.png").is_file()


def test_seeds_differ(compared: Path) -> None:
    nlls = {(r["cell"]["method"], r["cell"]["seed"]): r.get("held_out_nll") for r in rows_of(compared / "out")}
    assert nlls["lora", 0] != nlls["lora", 1]
    assert torch.tensor([v for v in nlls.values() if v is not None]).isfinite().all()
