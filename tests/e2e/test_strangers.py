"""Files of strangers, and secrets of one's own: nothing is run, nothing outside is read, no token is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, tiny_tokenizer
from tiny_runs import tune_flags

import pat
from pat import cli
from pat.training.arguments import build_arguments

SECRETS = ("hf_planted_flag_0123456789", "hf_planted_variable_0123456789")

ROWS = [{"instruction": f"Say {number}", "output": f"It is {number}."} for number in range(24)]


class Trap:
    """An object whose pickle touches a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.mark),)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, and a finished run that kept its checkpoints, started with two secrets."""
    folder = tmp_path_factory.mktemp("origin")
    build("llama", tied=True, num_hidden_layers=2).save_pretrained(folder / "base", max_shard_size="60KB")
    tiny_tokenizer(folder / "base")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "text.txt").write_text("a text to measure on " * 60)
    flags = tune_flags(folder / "base", folder / "data.jsonl", folder / "out", hub_token=SECRETS[0])
    flags |= {"report_to": "tensorboard"} if _has("tensorboard") else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRETS[1])
        pat.tune(
            **flags
            | {"milestone": 0.5, "save_strategy": "steps", "save_steps": 2, "keep_checkpoints": True}
            | {"calibration": str(folder / "text.txt")}
        )
    return folder


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.fixture
def work(origin: Path, tmp_path: Path) -> Path:
    shutil.copytree(origin, tmp_path / "work")
    return tmp_path / "work"


def files_with(folder: Path, text: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes())


def test_no_token_is_in_any_file_of_a_run(origin: Path) -> None:
    assert len(list((origin / "out").rglob("training_args.bin"))) > 1
    for secret in SECRETS:
        assert files_with(origin / "out", secret) == []


def test_the_token_is_there_for_the_hub_alone() -> None:
    names = {"model_name_or_path": "base", "dataset_name": "data.jsonl", "output_dir": "out"}
    arguments = build_arguments(**names, hub_token=SECRETS[0])
    assert arguments.run.hub_token == SECRETS[0]
    assert SECRETS[0] not in repr(arguments) and arguments.sft.hub_token is None


def test_the_only_path_in_what_a_run_leaves_is_where_a_base_lies(origin: Path) -> None:
    """peft looks for the base of an adapter by that path; everything else is free of the machine's names."""
    for adapter in ("adapter", "compact/adapter"):
        path = origin / "out" / adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        assert Path(config.pop("base_model_name_or_path")).is_dir()
        assert str(origin) not in json.dumps(config)
    adapters = {"adapter/adapter_config.json", "compact/adapter/adapter_config.json"}
    left = [name for name in files_with(origin / "out", str(origin)) if not name.startswith("checkpoints/")]
    assert set(left) == adapters


# -- models, adapters and checkpoints of strangers --------------------------------------------------------------------


def as_pickle(work: Path, mark: Path) -> None:
    for file in (work / "base").glob("model*"):
        file.unlink()
    (work / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))


def index_outside(name: Callable[[Path], str]) -> Callable[[Path, Path], None]:
    def spoil(work: Path, mark: Path) -> None:
        path = work / "base" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        first = min(index["weight_map"])
        shutil.move(work / "base" / index["weight_map"][first], work / "outside.safetensors")
        moved, files = index["weight_map"][first], index["weight_map"]
        index["weight_map"] = {key: name(work) if file == moved else file for key, file in files.items()}
        path.write_text(json.dumps(index))

    return spoil


def link_outside(work: Path, mark: Path) -> None:
    index_outside(lambda work: "model-link.safetensors")(work, mark)
    (work / "base" / "model-link.safetensors").symlink_to(work / "outside.safetensors")


def own_code(work: Path, mark: Path) -> None:
    path = work / "base" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    path.write_text(json.dumps(config))
    (work / "base" / "code.py").write_text(f"import os\nos.mknod({str(mark)!r})\n")


def sizes(**fields: int) -> Callable[[Path, Path], None]:
    def spoil(work: Path, mark: Path) -> None:
        path = work / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


BASES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a pickle": (as_pickle, "Could not load the model"),
    "an index that goes up": (index_outside(lambda _: "../outside.safetensors"), "'../outside.safetensors'"),
    "an index with a path": (index_outside(lambda work: str(work / "outside.safetensors")), "outside.safetensors"),
    "an index to a link": (link_outside, "'model-link.safetensors'"),
    "code of its own": (own_code, "custom code"),
    "a width of 10^15": (sizes(hidden_size=10**15), "hidden_size=1000000000000000 in config.json"),
    "10^9 layers": (sizes(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "10^12 tokens": (sizes(vocab_size=10**12), "vocab_size=1000000000000"),
    "10^18 of something": (sizes(max_window_layers=10**18), "max_window_layers=1000000000000000000"),
}


@pytest.mark.parametrize("command", ["tune", "merge", "evaluate"])
@pytest.mark.parametrize("case", BASES)
def test_a_base_of_a_stranger(
    case: str, command: str, work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, words = BASES[case]
    mark = tmp_path / "mark"
    spoil(work, mark)
    base, out = str(work / "base"), str(work / "new")
    argv = {
        "tune": ["--model_name_or_path", base, "--dataset_name", str(work / "data.jsonl"), "--output_dir", out],
        "merge": ["--adapter", str(work / "out" / "adapter"), "--base_model", base, "--output_dir", out],
        "evaluate": ["--model", base, "--text_file", str(work / "text.txt")],
    }[command]
    capfd.readouterr()
    status = cli.main([command, *argv])
    error = capfd.readouterr().err
    assert status == 2 and words in error.splitlines()[-1], error
    assert not mark.exists() and not Path(out).exists()


def test_pickles_beside_an_adapter_are_not_read(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark, adapter = tmp_path / "mark", work / "out" / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "training_args.bin"):
        (adapter / name).write_bytes(pickle.dumps(Trap(mark)))
    argv = ["merge", "--adapter", str(adapter), "--base_model", str(work / "base"), "--output_dir", str(work / "new")]
    assert cli.main(argv) == 2 and "not saved completely" in capfd.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_in_a_checkpoint_are_not_run(name: str, work: Path, tmp_path: Path) -> None:
    """The trainer's own files are read as tensors and plain values alone, its arguments not at all."""
    mark = tmp_path / "mark"
    checkpoints = sorted((work / "out" / "checkpoints").rglob(name))
    assert checkpoints
    for path in checkpoints:
        path.write_bytes(pickle.dumps(Trap(mark)))
    shutil.rmtree(work / "out" / "model")
    run_file = work / "out" / "run.json"
    run = json.loads(run_file.read_text())
    run_file.write_text(json.dumps(run | {"finished": ["stage_one", "compaction"]}))
    flags = tune_flags(work / "base", work / "data.jsonl", work / "out")
    found = (work / "out" / "checkpoints" / "compact").glob("checkpoint-*")
    earliest = min(found, key=lambda path: int(path.name.rpartition("-")[2]))
    flags |= {"milestone": 0.5, "calibration": str(work / "text.txt"), "resume_from_checkpoint": str(earliest)}
    error: Exception | None = None
    try:
        pat.tune(**flags)
    except Exception as caught:
        error = caught
    assert not mark.exists()
    assert (error is None) == (name == "training_args.bin"), error
    assert error is None or f"its {name} is not readable" in str(error), error
