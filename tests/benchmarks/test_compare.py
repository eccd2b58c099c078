"""`compare` from nothing to table and figures on a tiny model; cut off and started again it repeats nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import killed_runner
import psutil
import pytest
import torch
import yaml
from compare import inputs, runner
from compare.cells import Cell
from compare.command import main
from compare.config import CompareConfig
from compare.prepare import prepare
from compare.run_cell import round_weights, run_cell
from tiny_models import build, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer

from pat.checkpoint.staging import lock_folder
from pat.errors import ParityMissed
from pat.options import OptionsParser

pytestmark = pytest.mark.slow

MAKE_POOL = runner._make_pool

METHODS = ["base", "lora", "slicegpt_after", "random", "pat"]

NUM_RESULTS = 1 + 4 * 2
NUM_SEARCHED = 3 * 2  # LoRA, random channels, PAT


class InProcess:
    """In place of worker processes, whose imports take seconds: runs what is submitted here and at once."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **options: Any) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compare.runner._make_pool", lambda workers, threads: InProcess())
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, in_process: None) -> Path:
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
        "keep_models": True,
    }
    (root / "compare.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["--config", str(root / "compare.yaml")]) == 0
    return root


def run(compared: Path, output_dir: Path, **changed: Any) -> int:
    """Run the same comparison elsewhere, some flags being others."""
    argv = ["--config", str(compared / "compare.yaml"), "--output_dir", str(output_dir)]
    for name, value in changed.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return main(argv)


def config_of(compared: Path, **changed: Any) -> CompareConfig:
    parser = OptionsParser("compare", CompareConfig)
    return dataclasses.replace(parser.parse(["--config", str(compared / "compare.yaml")]), **changed)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_cell_has_its_figures_and_the_table_holds_them(compared: Path) -> None:
    rows = rows_of(compared / "out")
    results = [row for row in rows if not row["cell"]["search"]]
    assert len(results) == NUM_RESULTS and len(rows) == NUM_RESULTS + NUM_SEARCHED
    assert all(row["held_out_nll"] > 0 and row["num_held_out_tokens"] > 0 for row in results)
    by_method = {row["cell"]["method"]: row for row in results}
    whole, target = by_method["base"]["num_parameters"], by_method["random"]["target_parameters"]
    assert by_method["lora"]["num_parameters"] == whole
    assert by_method["random"]["num_parameters"] == target < whole
    # PAT cuts the MLPs, to the last channel that the target leaves room for.
    per_channel = by_method["base"]["num_parameters"] // 100
    assert target - per_channel < by_method["pat"]["num_parameters"] <= target
    assert by_method["pat"]["pruned_intermediate_size"] < by_method["pat"]["intermediate_size"]
    # Trained parameters are LoRA's, to half a rank.
    budget = by_method["lora"]["num_trainable"]
    assert by_method["random"]["trainable_budget"] == by_method["pat"]["trainable_budget"] == budget
    for name in ("random", "pat"):
        assert abs(by_method[name]["num_trainable"] / budget - 1) < 0.5 / by_method[name]["rank"] + 0.01, name
    assert len({row["held_out_nll"] for row in results if row["cell"]["method"] == "lora"}) == 2  # seeds differ

    out = compared / "out"
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "results.md", "nll.png", "data", "models"}
    assert len(list((out / "models").iterdir())) == NUM_RESULTS
    kept = AutoModelForCausalLM.from_pretrained(next((out / "models").glob("*random*")))
    assert kept.num_parameters() == target
    table = (out / "results.md").read_text(encoding="utf-8")
    assert "| 25.0% | PAT | PAT |" in table and "| 25.0% | SliceGPT | FT→P |" in table and "Missing" not in table


def test_started_again_it_repeats_nothing_and_says_what_it_does_not_show(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(compared / "out", tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert run(compared, tmp_path / "out", methods=["base", "lora"]) == 0
    # Three methods with two seeds, and the searches of two of them.
    assert f"does not show: {3 * 2 + 2 * 2}, of other models" in caplog.text
    assert run(compared, tmp_path / "out") == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_cut_off_it_goes_on_and_comes_to_the_same_figures(compared: Path, tmp_path: Path) -> None:
    whole, out = rows_of(compared / "out"), tmp_path / "out"
    shutil.copytree(compared / "out" / "data", out / "data")
    kept = [row for row in whole if row["cell"]["search"] or row["cell"]["method"] in ("pat", "random")]
    lines = [json.dumps(row) for row in kept]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:40], encoding="utf-8")
    assert run(compared, out) == 0
    text = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert text[: len(kept)] == lines
    again = {json.dumps(row["cell"]): row["held_out_nll"] for row in map(json.loads, text[len(kept) + 1 :])}
    expected = {json.dumps(row["cell"]): row["held_out_nll"] for row in whole if row not in kept}
    assert again == pytest.approx(expected, abs=1e-6)


def test_interrupted_it_leaves_a_table_and_says_how_to_go_on(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    shutil.copytree(compared / "out", tmp_path / "out")
    (tmp_path / "out" / "results.md").unlink()
    monkeypatch.setattr("compare.runner.run_cells", interrupted)
    assert run(compared, tmp_path / "out") == 130
    assert "the same command goes on from there" in caplog.text
    assert "| PAT | PAT |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_a_failing_cell_does_not_stop_the_others(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no luck")

    monkeypatch.setattr("compare.run_cell.prune", fail)
    assert run(compared, tmp_path / "out", methods=["random", "base"], learning_rates=1e-3, seeds=0) == 1
    assert "ValueError: no luck" in capsys.readouterr().err
    assert [row["cell"]["method"] for row in rows_of(tmp_path / "out") if "failed" not in row] == ["base"]
    assert "Untuned" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_a_worker_that_is_killed_costs_its_cells_only(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compare.runner._make_pool", MAKE_POOL)
    monkeypatch.setattr("compare.runner._run", killed_runner.run)
    changed = {"methods": ["random", "base"], "learning_rates": 1e-3, "seeds": 0, "workers": 1}
    assert run(compared, tmp_path / "out", **changed) == 1
    assert "worker process died" in capsys.readouterr().err
    assert [row["cell"]["method"] for row in rows_of(tmp_path / "out") if "failed" not in row] == ["base"]


def test_killed_it_leaves_no_worker(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--methods", "base", "lora", "--learning_rates", "1e-3", "--steps", "100000", "--workers", "1"]
    command = [sys.executable, "-m", "compare", "--config", str(compared / "compare.yaml"), *flags]
    path = os.pathsep.join(sys.path)
    process = psutil.Popen(
        [*command, "--output_dir", str(out)], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "results.jsonl").is_file() or not rows_of(out):  # and LoRA is being trained
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = process.children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert workers and psutil.wait_procs(workers, timeout=30)[1] == []


def test_somebody_elses_folder_is_left_alone(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = lock_folder(tmp_path)
    assert lock is not None
    try:
        assert run(compared, tmp_path) == 2
    finally:
        os.close(lock)
    assert "another comparison is running there" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert run(compared, tmp_path) == 2
    assert "holds files, but no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.txt"]


def test_every_method_is_measured_at_the_precision_of_the_checkpoint() -> None:
    linear = torch.nn.Linear(3, 3)
    exact = linear.weight.detach().clone()
    round_weights(linear, None)
    assert torch.equal(linear.weight, exact)
    round_weights(linear, torch.bfloat16)
    assert linear.weight.dtype == torch.float32 and not torch.equal(linear.weight, exact)
    assert torch.equal(linear.weight, exact.bfloat16().float())


def test_a_rate_that_diverges_is_not_taken(compared: Path, tmp_path: Path) -> None:
    assert run(compared, tmp_path / "out", methods="lora", seeds=0, learning_rates=[1e30, 1e-3]) == 0
    rows = rows_of(tmp_path / "out")
    by_rate = {row["cell"]["learning_rate"]: row for row in rows if row["cell"]["search"]}
    assert by_rate[1e30]["validation_nll"] is None
    assert [row["cell"]["learning_rate"] for row in rows if not row["cell"]["search"]] == [1e-3]


def test_results_that_diverge_are_results_and_not_tried_again(compared: Path, tmp_path: Path) -> None:
    out, methods = tmp_path / "out", ["base", "lora", "slicegpt_after", "pat"]
    changed = {"methods": methods, "seeds": 0, "learning_rates": 1e30}
    assert run(compared, out, **changed) == 0
    figures = {row["cell"]["method"]: row["held_out_nll"] for row in rows_of(out)}
    assert figures.pop("base") > 0 and figures == {"lora": None, "slicegpt_after": None, "pat": None}
    assert (out / "results.md").read_text(encoding="utf-8").count("(1 of 1 diverged)") == 3
    before = (out / "results.jsonl").read_bytes()
    assert run(compared, out, **changed) == 0
    assert (out / "results.jsonl").read_bytes() == before


def test_a_rate_whose_merge_is_refused_is_not_taken_and_a_result_says_so(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ParityMissed("not the tuned model")

    config = config_of(compared, output_dir=tmp_path)
    prepare(config)
    monkeypatch.setattr("compare.run_cell.run_tune", refuse)
    row = run_cell(config, Cell("base", "pat", 0.25, 0, 1e-3, search=True), None)
    assert row["validation_nll"] is None and row["diverged"] == "not the tuned model"
    with pytest.raises(ParityMissed):
        run_cell(config, Cell("base", "pat", 0.25, 0, 1e-3), None)


def test_other_data_models_and_baselines_are_refused_and_nothing_is_lost(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    other = tmp_path / "rows.jsonl"
    text = (compared / "rows.jsonl").read_text(encoding="utf-8")
    other.write_text(text.replace("say 7 ", "say so "), encoding="utf-8")
    assert run(compared, out, data=other) == 2 and "gives other rows" in capsys.readouterr().err
    build("llama", tied=True, seed=5).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert run(compared, out, models=tmp_path / "base") == 2 and "with other model" in capsys.readouterr().err
    shutil.copytree(inputs.BASELINES, tmp_path / "baselines")
    monkeypatch.setattr(inputs, "BASELINES", tmp_path / "baselines")
    assert run(compared, out) == 0  # the same sources from elsewhere are the same
    with (tmp_path / "baselines" / "slicegpt.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert run(compared, out) == 2 and "with other baselines" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")}.items() <= before.items()

    other.write_text(text, encoding="utf-8")  # the same rows from elsewhere, and methods that use no baseline
    assert run(compared, out, data=other, methods=["base", "lora", "pat"]) == 0


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("phi3", {"methods": "llm_pruner"}, "LLM-Pruner"),
        ("gemma2", {"methods": "slicegpt"}, "SliceGPT"),
        ("llama", {"methods": "llm_pruner", "calibration_rows": 1000}, "--calibration_rows"),
        ("llama", {"ratios": [0.25, 0.26]}, "come to the widths"),
        ("llama", {"tasks": "piqa", "data_dir": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_run_is_found_before_anything_is_trained(
    family: str,
    changed: dict[str, Any],
    said: str,
    compared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(family, tied=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert run(compared, tmp_path / "out", models=tmp_path / "base", **changed) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_comparison_does_not_use_cannot_fail_it(compared: Path, tmp_path: Path) -> None:
    prepare(config_of(compared, methods=["random"], calibration_rows=1000, output_dir=tmp_path / "random"))
    prepare(config_of(compared, methods=["base", "lora"], ratios=[0.25, 0.26], output_dir=tmp_path / "lora"))


def test_pat_and_lora_see_the_same_rows_in_the_same_order(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    step = Trainer.training_step

    def recorded(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", recorded)
    # What no response is left of is dropped by `pat tune` before it trains, and by a stock trainer itself.
    rows = [{"prompt": f"say {i} " * (1 if i % 2 else 40), "completion": f"it is {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = str(tmp_path / "rows.jsonl")
    config = config_of(compared, data=data, output_dir=tmp_path / "out", learning_rates=[1e-3], steps=4)
    prepare(config)
    orders = []
    for cell in (Cell("base", "lora", 0.0, 1, 1e-3), Cell("base", "pat", 0.25, 1, 1e-3)):
        seen.clear()
        assert run_cell(config, cell, None)["held_out_nll"] > 0
        orders.append(seen[-4:])  # PAT's run rehearses before
    assert orders[0] == orders[1]
    assert len({str(batch) for batch in orders[0]}) == 4


def test_accuracies_are_measured_of_whole_sliced_and_small_models(
    compared: Path, tmp_path: Path, tests_data: Path
) -> None:
    out = tmp_path / "out"
    asked = {"tasks": "piqa", "data_dir": tests_data / "tasks", "protocols": ["letter", "likelihood"], "limit": 4}
    methods = ["base", "slicegpt", "pat"]
    assert run(compared, out, methods=methods, seeds=0, learning_rates=1e-3, **asked) == 0
    for row in rows_of(out):
        scores = {score["protocol"]: score for score in row["tasks"]["scores"]}
        assert scores.keys() == {"letter", "likelihood"} and scores["likelihood"]["num_questions"] == 4
    table = (out / "results.md").read_text(encoding="utf-8")
    assert "Accuracy, letter (%)" in table and "Accuracy, likelihood, normalised (%)" in table
    assert "accuracy by task, likelihood" in table and "| piqa |" in table
    assert (out / "accuracy.png").is_file()
