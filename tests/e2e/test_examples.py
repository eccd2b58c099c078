"""The examples run as they stand, on small models and with fewer steps; tests/distributed runs `own_trainer.py`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat.training import tune as tuning

EXAMPLES = Path(__file__).parents[2] / "examples"

SHORT: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def share_left(folder: Path, base: Path) -> float:
    sizes = [AutoModelForCausalLM.from_pretrained(place).num_parameters() for place in (folder, base)]
    return float(sizes[0] / sizes[1])


def test_sft_then_dpo(stories260k_path: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": f"one {i} ", "completion": f"two {i}"} for i in range(24)])
    pairs = [{"prompt": f"one {i} ", "chosen": f"two {i}", "rejected": "no"} for i in range(8)]
    preferences = write(tmp_path / "pairs.jsonl", pairs)
    load("sft_then_dpo").main(str(stories260k_path), data, preferences, str(tmp_path / "out"), **SHORT)
    small, aligned = tmp_path / "out" / "sft" / "model", tmp_path / "out" / "dpo"
    assert 0.7 < share_left(aligned, stories260k_path) < 0.8
    before, after = (load_file(folder / "model.safetensors") for folder in (small, aligned))
    assert any(not before[name].equal(after[name]) for name in before.keys() & after.keys())


def test_plain_transformers(stories260k_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"Once there were {i} cats." for i in range(24)), encoding="utf-8")
    out = tmp_path / "out"
    load("plain_transformers").main(str(stories260k_path), str(tmp_path / "text.txt"), str(out), **SHORT)
    assert 0.7 < share_left(out, stories260k_path) < 0.8


def test_the_notebook(stories260k_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((EXAMPLES / "quick_start.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "outputs are not kept"
    write(tmp_path / "data.jsonl", [{"prompt": f"one {i} ", "completion": f"two {i}"} for i in range(24)])
    monkeypatch.chdir(tmp_path)
    run = tuning.run_tune
    monkeypatch.setattr(tuning, "run_tune", lambda arguments, **more: run(shortened(arguments), **more))
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)  # our own notebook
        if "BASE" in names and names["BASE"] != str(stories260k_path):
            names["BASE"] = str(stories260k_path)
    assert names["small"].num_parameters < names["base"].num_parameters
    assert (tmp_path / "quick-start" / "report.html").is_file()


def shortened(arguments: Any) -> Any:
    arguments.sft.max_steps = SHORT["max_steps"]
    return arguments
