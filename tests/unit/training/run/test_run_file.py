"""`run.json`: what a run belongs to, and what may be another when it is gone on with."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import build, tiny_tokenizer

from pat.errors import PatError
from pat.loading import load_config
from pat.training.arguments import build_arguments
from pat.training.run.run_file import RunFile, tokens_fingerprint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    build("llama", tied=True).save_pretrained(folder)
    return folder


def described(base: Path, *, data: str = "d", **flags: Any) -> RunFile:
    arguments = build_arguments(model_name_or_path=base, dataset_name="rows.jsonl", output_dir="out", **flags)
    return RunFile.of(arguments, load_config(str(base))[0], data)


def test_it_is_the_same_after_a_way_through_the_disk_and_of_a_copied_base(base: Path, tmp_path: Path) -> None:
    run = described(base, lora_target_modules=["q_proj", "v_proj"], hub_token="secret")
    run.after("stage_one").write(tmp_path)
    assert "secret" not in (tmp_path / "run.json").read_text()
    read = RunFile.read(tmp_path)
    assert read == run.after("stage_one") and read.finished == ["stage_one"]
    moved = shutil.copytree(base, tmp_path / "elsewhere" / "base")
    read.check(described(moved, lora_target_modules=["q_proj", "v_proj"]), tmp_path)
    assert RunFile.read(tmp_path / "elsewhere") is None
    stored = json.loads((tmp_path / "run.json").read_text()) | {"seconds": {"stage_one": 1.0}}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert RunFile.read(tmp_path) == read


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": 7},
        {"num_train_epochs": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"save_steps": 5, "logging_steps": 1, "eval_strategy": "steps", "report_to": "tensorboard"},
        {"output_dir": "other", "no_compact": True, "keep_checkpoints": True, "dataloader_num_workers": 2},
        {"resume_from_checkpoint": "true", "dtype": "float32", "gradient_checkpointing": True},
    ],
)
def test_what_may_change_may_change(base: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    arguments = {"output_dir": "out"} | flags
    run = described(base)
    given = build_arguments(model_name_or_path=base, dataset_name="rows.jsonl", **arguments)
    run.check(RunFile.of(given, load_config(str(base))[0], "d"), tmp_path)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"pruning_ratio": 0.5}, "pruning_ratio: not given in the run, 0.5 given"),
        ({"lora_r": 8}, "lora_r: 20 in the run, 8 given"),
        (
            {"seed": 7, "optim": "adafactor"},
            "optim: adamw_torch_fused in the run, adafactor given; seed: 42 in the run",
        ),
        ({"recipe": "paper"}, "rotation: auto in the run, none given"),
        ({"held_out": 4}, "held_out: not given in the run, 4 given"),
        ({"data": "e"}, "fingerprint of the data: d in the run, e given"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(
    base: Path, tmp_path: Path, flags: dict[str, Any], difference: str
) -> None:
    with pytest.raises(PatError) as error:
        described(base).check(described(base, **flags), tmp_path)
    assert difference in str(error.value)


def test_files_are_compared_by_their_content_and_told_of_by_no_path(base: Path, tmp_path: Path) -> None:
    def given(folder: str, text: str) -> dict[str, str]:
        names = ("held_out", "calibration", "chat_template_path")
        paths = {name: tmp_path / folder / f"{name}.jinja" for name in names}
        for path in paths.values():
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{text} {path.name}")
        return {name: str(path) for name, path in paths.items()}

    run = described(base, **given("here", "one"))
    run.write(tmp_path)
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()
    run.check(described(base, **given("there", "one")), tmp_path)
    with pytest.raises(PatError, match=r"chat_template_path: sha256:.*; calibration: .*; held_out: "):
        run.check(described(base, **given("here", "two")), tmp_path)


def test_another_base_of_the_same_name_is_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    build("llama", tied=True, num_hidden_layers=1).save_pretrained(other)
    with pytest.raises(PatError, match=r"fingerprint of the base: .* in the run"):
        described(base).check(described(other), tmp_path)


def test_the_date_that_a_template_writes_is_not_of_the_run() -> None:
    """What it makes of the data is another thing every day; what it is, and the vocabulary, are not."""
    tokenizer = tiny_tokenizer()

    def found(template: str, token: int) -> str:
        tokenizer.chat_template = template
        rows: Any = Dataset.from_list([{"input_ids": [1, token], "labels": [1, token]}])
        vocabulary = SimpleNamespace(tokenizer=tokenizer)
        data: Any = SimpleNamespace(train=rows, held_out=(), held_out_of_base=None, vocabulary=vocabulary)
        return tokens_fingerprint(data)

    assert found("{{ messages }}", 2) != found("{{ messages }}", 3)
    dated = "{{ strftime_now('%d') }}{{ messages }}"
    assert found(dated, 2) == found(dated, 3) != found(f"{dated}.", 2)


def test_a_run_that_is_older_than_an_option_had_its_default(base: Path, tmp_path: Path) -> None:
    run = described(base)
    for name in ("streaming", "dataset_weights", "packing"):
        del run.configuration[name]
    run.check(described(base), tmp_path)
    with pytest.raises(PatError, match="packing: False in the run, True given"):
        run.check(described(base, packing=True), tmp_path)
