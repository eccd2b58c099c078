"""The README's commands and snippets run as they stand, on a small model, with fewer steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, tiny_tokenizer

from pat.cli import COMMANDS, main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

FEWER = {
    "tune": ["--max_steps", "2", "--held_out", "2", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the names that the README uses: a base, and data."""
    base = tmp_path / "meta-llama" / "Llama-3.2-1B"
    build("llama", tied=True, num_hidden_layers=2).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "base").symlink_to(base)
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i * i}"} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_and_the_result_loads_as_the_readme_says(place: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pat ")]
    assert [argv[0] for argv in commands] == ["plan", "tune"]
    for argv in commands:
        assert main([*argv, *FEWER.get(argv[0], [])]) == 0, argv
    loading = next(block for block in blocks("python") if "out/model" in block)
    names: dict[str, Any] = {}
    exec(loading, names)  # our own README
    assert names["model"].num_parameters() < 0.8 * build("llama", tied=True, num_hidden_layers=2).num_parameters()
    assert (place / "out" / "report.html").is_file()


def test_the_script_trains_merges_and_saves(place: Path) -> None:
    script = next(block for block in blocks("python") if "SFTTrainer(" in block)
    short = 'SFTConfig("checkpoints", max_steps=60, per_device_train_batch_size=2, use_cpu=True, bf16=False, '
    changed = script.replace('SFTConfig("checkpoints", ', short)
    assert changed != script
    names: dict[str, Any] = {}
    exec(changed, names)  # our own README
    assert names["dense"].num_parameters() < 0.8 * names["base"].num_parameters()
    assert (place / "small" / "model.safetensors").is_file()


def test_the_table_of_commands_is_complete() -> None:
    assert set(re.findall(r"^\| `pat (\w+)`", README, flags=re.MULTILINE)) == {*COMMANDS, "launch"}


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 900
    root = Path(__file__).parents[2]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and not [link for link in links if not (root / link).exists()]
