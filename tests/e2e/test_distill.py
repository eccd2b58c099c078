"""`pat tune` with a teacher: what is on record, resuming, what stays in memory, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, tiny_tokenizer
from tiny_runs import STEPS, tune_flags
from transformers import AutoModelForCausalLM

import pat
from pat.cli import main
from pat.errors import PatError
from pat.training.distillation.teacher import OWN
from pat.training.stages import Stages
from pat.tuner import PatModel

MILESTONE = 2


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, teachers that fit it and do not, and rows: three steps an epoch, so that stage two crosses one."""
    root = tmp_path_factory.mktemp("places")

    def save(name: str, **fields: Any) -> None:
        build("llama", tied=True, **fields).save_pretrained(root / name)
        tiny_tokenizer(root / name)

    save("base")
    save("large", hidden_size=64)
    save("vocabulary", vocab_size=256)
    save("tokens")
    file = root / "tokens" / "tokenizer.json"
    file.write_text(file.read_text().replace('"~":', '"é":'), encoding="utf-8")
    rows = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(20)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def flags(places: Path, out: Path, **more: Any) -> dict[str, Any]:
    return tune_flags(places / "base", places / "rows.jsonl", out) | {
        "per_device_train_batch_size": 4,
        "milestone": MILESTONE / STEPS,
        "learning_rate": 5e-3,
        "keep_checkpoints": True,
        "save_strategy": "steps",
        "save_steps": 1,
        **more,
    }


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def logged(out: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in results(out)["log_history"] if "loss" in row and name in row]


@pytest.fixture(scope="module", params=[None, 8], ids=["whole vocabulary", "top 8"])
def run(request: pytest.FixtureRequest, places: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that learns from its own stage one, and how many tokens it keeps apart."""
    out = tmp_path_factory.mktemp("run") / "out"
    pat.tune(**flags(places, out, distill=True, distill_top_k=request.param))
    return out, request.param


def test_stage_two_learns_from_it_and_says_so(run: tuple[Path, Any]) -> None:
    out, top_k = run
    divergences = logged(out, "distill/kl")
    assert [step for step, _ in divergences] == list(range(MILESTONE + 1, STEPS + 1))
    assert all(value > 0 for _, value in divergences)
    teacher = results(out)["teacher"]
    assert (teacher["name"], teacher["weight"], teacher["top_k"]) == (OWN, 0.5, top_k)
    assert teacher["seconds"] > 0 and (teacher["cached_bytes"] > 0) == (top_k is not None)
    assert f"- teacher: {OWN}, 0.5 of the loss" in (out / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("left", [MILESTONE, STEPS - 2])
def test_a_run_that_was_cut_off_is_resumed(run: tuple[Path, Any], left: int, places: Path, tmp_path: Path) -> None:
    """With the same teacher, made anew of the adapter as of the milestone: equal to the last bit."""
    out, top_k = tmp_path / "out", run[1]
    shutil.copytree(run[0], out)
    for path in (out / "checkpoints" / "compact").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > left:
            shutil.rmtree(path)
    shutil.rmtree(out / "model")
    (out / "results.json").unlink()
    (out / "compact" / "adapter" / "training.json").unlink()
    (out / "run.json").write_text(json.dumps(json.loads((out / "run.json").read_text()) | {"finished": []}))
    caches = list((out / "checkpoints").glob("teacher-*/*.npy"))
    before = [path.stat().st_mtime_ns for path in caches]
    assert bool(caches) == (top_k is not None)
    pat.tune(**flags(places, out, distill=True, distill_top_k=top_k, resume_from_checkpoint="true"))
    assert [path.stat().st_mtime_ns for path in caches] == before
    assert logged(out) == logged(run[0]) and len(logged(out)) == STEPS
    first, second = (AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (run[0], out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_teacher_teaches_by_another_share(places: Path, tmp_path: Path, run: tuple[Path, Any]) -> None:
    out = tmp_path / "out"
    pat.tune(**flags(places, out, teacher=str(places / "large"), distill_weight=1.0))
    assert results(out)["teacher"]["name"] == "large" and results(out)["teacher"]["weight"] == 1.0
    assert json.loads((out / "run.json").read_text())["configuration"]["teacher"].startswith("large ")
    divergences = dict(logged(out, "distill/kl"))
    assert logged(out)[MILESTONE:] == [(step, pytest.approx(value, rel=1e-5)) for step, value in divergences.items()]


def test_with_all_tokens_on_disk_it_is_the_same_training(places: Path, tmp_path: Path) -> None:
    """Up to rounding, since rows are padded to other lengths when the teacher is asked once for all."""
    for name, top_k in (("asked", None), ("disk", 128)):
        pat.tune(**flags(places, tmp_path / name, distill=True, distill_top_k=top_k, max_grad_norm=0))
    asked, disk = (logged(tmp_path / name, "distill/kl")[:2] for name in ("asked", "disk"))
    assert [value for _, value in asked] == pytest.approx([value for _, value in disk], rel=1e-3)


@pytest.mark.parametrize(("top_k", "num_masked"), [(None, 1), (8, 0)])
def test_the_large_model_stays_only_as_long_as_it_is_asked(
    top_k: int | None, num_masked: int, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def counting(self: Stages, trainer: Any, part: str, resume_from: Any) -> None:
        gc.collect()
        seen[part] = sum(isinstance(found, PatModel) for found in gc.get_objects())
        original(self, trainer, part, resume_from)

    original = Stages._train
    gc.collect()
    before = sum(isinstance(found, PatModel) for found in gc.get_objects())
    monkeypatch.setattr(Stages, "_train", counting)
    pat.tune(**flags(places, tmp_path / "out", distill=True, distill_top_k=top_k))
    assert seen["stage_two"] - before == num_masked


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"teacher": "vocabulary"}, "vocabulary of 256"),
        ({"teacher": "tokens"}, "other tokens"),
        ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
        ({"distill": True, "distill_weight": 0}, "distill_weight=0"),
        ({"distill": True, "distill_top_k": 0}, "distill_top_k=0"),
        ({"distill": True, "distill_top_k": 129}, "at most the vocabulary, 128"),
        ({"distill": True, "distill_top_k": 4, "packing": True}, "packed together"),
        ({"distill": True, "no_compact": True}, "--no_compact"),
    ],
    ids=str,
)
def test_it_is_refused_in_one_line_before_anything_is_written(
    more: dict[str, Any], words: str, places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = more.get("teacher")
    given = more | ({"teacher": str(places / teacher)} if teacher in ("vocabulary", "tokens") else {})
    options = flags(places, tmp_path / "out", **given)
    assert main(["tune", *[item for name, value in options.items() for item in (f"--{name}", str(value))]]) == 2
    printed = capfd.readouterr().err.strip()
    assert words in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_teaches_nothing_is_said(places: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pat.tune(**flags(places, tmp_path / "zero", distill=True, distill_top_k=4, milestone=0.0, max_steps=2))
    pat.tune(**flags(places, tmp_path / "end", distill=True, milestone=1.0))
    for words in ("is the untuned base", "asks the teacher about 12 rows, and stage two reads 8", "has no effect"):
        assert any(words in line for line in caplog.messages)
    assert results(tmp_path / "end")["teacher"] is None


def test_a_teacher_that_is_gone_is_said(run: tuple[Path, Any], places: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "model")
    for name in ("adapter/adapter_model.safetensors", "compact/adapter/training.json", "results.json"):
        (out / name).unlink()
    with pytest.raises(PatError, match="resume from a checkpoint of stage one"):
        pat.tune(**flags(places, out, distill=True, distill_top_k=run[1], resume_from_checkpoint="true"))
