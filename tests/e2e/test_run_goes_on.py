"""Whatever ends a run, the same command goes on: killed, torn or refused at a file operation, stopped by a signal."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import faults
import pytest
import torch
from faults import Fault
from tiny_models import build, tiny_tokenizer
from tiny_runs import tune_flags

import pat
from pat.checkpoint.staging import lock_folder
from pat.cli import main
from pat.errors import PatError
from pat.training.run.base_scores import BaseScores
from pat.training.run.checkpoints import last_checkpoint
from pat.training.run.run_file import RunFile

STEPS = 3

LAST = "checkpoints/compact/checkpoint-2"

LEFT = {"model", "adapter", "compact", "results.json", "report.html", "run.json", "held_out.jsonl"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two layers, and rows."""
    folder = tmp_path_factory.mktemp("places")
    build("llama", tied=True, num_hidden_layers=2).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def flags(places: Path, out: Path, **more: Any) -> dict[str, Any]:
    short = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "milestone": 0.34, "held_out": "2"}
    small = {"per_device_train_batch_size": 2, "learning_rate": 5e-3}
    return tune_flags(places / "base", places / "rows.jsonl", out, **(short | small | more))


def argv(places: Path, out: Path, **more: Any) -> list[str]:
    return ["tune", *(part for name, value in flags(places, out, **more).items() for part in (f"--{name}", str(value)))]


def tensors(out: Path) -> dict[str, str]:
    """Digest what a run has written of weights."""
    files = [path for path in out.rglob("*.safetensors") if "checkpoints" not in path.parts]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def untouched(out: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out, *out.rglob("*"))}


@pytest.fixture(scope="module")
def whole(places: Path) -> tuple[Path, list[str]]:
    """The run that nothing interrupts, and its file operations."""
    out = places / "whole"
    outcome = faults.run(argv(places, out), out)
    assert outcome.status == 0, outcome.said
    assert {path.name for path in out.iterdir()} == LEFT
    return out, outcome.operations


def survives(places: Path, whole: Path, moment: int, fault: Fault, **more: Any) -> None:
    """Hit a run at one operation; the same command then comes to the same tensors, and leaves nothing else."""
    out = places / f"{fault}-{moment}"
    first = faults.run(argv(places, out, **more), out, moment, fault)
    if fault == "refuse":
        # A disk may be full where that does no harm, and the folder may be what cannot be made.
        assert first.status in (0, 1, 2), first.said
        assert "Traceback" not in first.said and (first.status == 0 or first.said.count("pat: ") == 1), first.said
    else:
        assert first.status == faults.KILLED, first.said
    goes_on(places, out, whole, **more)


def goes_on(places: Path, out: Path, whole: Path, **more: Any) -> None:
    """Give the command again; it comes to the same tensors, losses and figures, and leaves nothing else."""
    again = faults.run(argv(places, out, **more), out)
    assert again.status == 0, again.said
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert tensors(out) == tensors(whole)
    assert json.loads((out / "run.json").read_text())["finished"][-1] == "results"
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, out)]
    losses = [[row["loss"] for row in result["log_history"] if "loss" in row] for result in results]
    assert losses[0] == losses[1]
    assert results[0]["cut"] == results[1]["cut"] and results[0]["parity"] == results[1]["parity"]
    shutil.rmtree(out)


def test_a_finished_run_says_so(places: Path, whole: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = whole
    before = untouched(out)
    assert main(argv(places, out)) == 0
    captured = capfd.readouterr()
    finished, ask = captured.out.splitlines()
    assert "is finished, after 3 steps" in finished and ask.startswith("To ask it: ")
    assert untouched(out) == before
    assert pat.tune(**flags(places, out)).record.num_steps == STEPS
    with pytest.raises(PatError, match=r"max_steps: 3 in the run, 4 given.*--overwrite true"):
        pat.tune(**flags(places, out, max_steps=4))
    with pytest.raises(PatError, match=r"seed: 42 in the run, 1 given.*--overwrite true"):
        pat.tune(**flags(places, out, seed=1))
    assert untouched(out) == before


def test_figures_that_are_missing_are_made_of_model_and_adapter(
    places: Path, whole: tuple[Path, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    before, model = json.loads((out / "results.json").read_text()), untouched(out / "model")
    (out / "results.json").unlink()
    pat.tune(**flags(places, out))
    assert "the model is trained" in capfd.readouterr().err
    assert untouched(out / "model") == model
    again = json.loads((out / "results.json").read_text())
    for name in ("cut", "parity", "log_history", "pat_config", "compaction", "num_tokens_seen", "learning_rates"):
        assert again[name] == before[name], name
    for stage, figures in before["figures"].items():
        assert again["figures"][stage]["held_out_nll"] == figures["held_out_nll"]
    # A model that is not the adapter's is written anew.
    (out / "results.json").unlink()
    (out / "model" / "model.safetensors").write_bytes(b"torn")
    pat.tune(**flags(places, out))
    assert tensors(out) == tensors(whole[0])
    # Nor is a run finished whose model is not whole.
    weights = out / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 50)
    again = pat.tune(**flags(places, out)).record
    assert tensors(out) == tensors(whole[0])
    assert any("its model is not whole: " in line for line in again.warnings)
    # Its adapter is torn as well, so that nothing is left to make it of.
    os.truncate(weights, weights.stat().st_size - 50)
    half(out / "compact" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PatError, match=r"compact/adapter: .*adapter_model.safetensors is not readable.*--overwrite"):
        pat.tune(**flags(places, out))


def test_a_model_without_adapter_is_not_thrown_away(
    places: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    (out / "results.json").unlink()
    shutil.rmtree(out / "compact")
    shutil.rmtree(out / "adapter")
    with pytest.raises(PatError, match="--overwrite true"):
        pat.tune(**flags(places, out))
    assert (out / "model" / "config.json").is_file()


def test_one_run_a_folder(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = lock_folder(out)
    if lock is None:
        pytest.skip("folders cannot be locked here")
    assert main(argv(places, out)) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "another run is writing there" in err[0]
    assert not list(out.iterdir())
    os.close(lock)


@pytest.mark.parametrize("more", [{}, {"save_strategy": "no"}])
def test_a_signal_saves_says_so_and_the_run_goes_on(
    more: dict[str, Any], places: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = faults.run(argv(places, out, **more), out, signals=1)
    assert first.status == 128 + 15
    assert "SIGTERM has stopped the run after step 1 of 3, with a checkpoint; the same command" in first.said
    assert "Traceback" not in first.said
    again = faults.run(argv(places, out, **more), out)
    assert again.status == 0 and "going on from checkpoints/checkpoint-1" in again.said
    assert tensors(out) == tensors(whole[0])


def test_a_second_signal_stops_at_once(places: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert faults.run(argv(places, out), out, signals=2).status == -15
    assert last_checkpoint(out / "checkpoints") is None


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: half(c / "optimizer.pt"), "its optimizer.pt is not readable"),
        (lambda c: half(c / "adapter_model.safetensors"), "its adapter_model.safetensors is not readable"),
        (lambda c: half(c / "trainer_state.json"), "its trainer_state.json is not readable"),
        (lambda c: (c / "rng_state.pth").unlink(), "it has no rng_state.pth"),
        (lambda c: (c / "trainer_state.json").write_text("[]"), "its trainer_state.json is no mapping"),
        (lambda c: put(c / "trainer_state.json", global_step="2"), "got global_step='2'"),
        (lambda c: put(c / "trainer_state.json", global_step=1), "its trainer_state.json is that of step 1"),
        (lambda c: put(c / "trainer_state.json", log_history=3), "log_history"),
        (lambda c: put(c / "adapter_config.json", r=7), "its adapter_config.json has r=7, and the run's adapter 20"),
        (lambda c: put(c / "adapter_config.json", target_modules=["q_proj"]), "has target_modules=\\['q_proj'\\]"),
    ],
)
def test_a_checkpoint_that_is_torn_or_not_its_runs_is_named_and_passed_over(
    spoil: Callable[[Path], Any], words: str, tmp_path: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = shutil.copytree(stopped, tmp_path / "out") / "checkpoints"
    spoil(checkpoints / "compact" / "checkpoint-2")
    assert last_checkpoint(checkpoints) == str(checkpoints / "compact" / "checkpoint-1")
    [said] = caplog.messages
    assert "checkpoint-2 is passed over" in said and re.search(words, said), said


FIRST = "--resume_from_checkpoint .*/checkpoints/checkpoint-1, or start anew with --overwrite true"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: shutil.rmtree(out / "adapter"), f"out/adapter: .* it has no adapter_config.json; .*{FIRST}"),
        (lambda out: shutil.rmtree(out / "compact" / "model"), f"compact/model: .* it has no config.json; .*{FIRST}"),
        (lambda out: half(out / "compact" / "model" / "model.safetensors"), f"compact/model: .* not readable.*{FIRST}"),
        (
            lambda out: shutil.copy(out / "checkpoints/checkpoint-1/optimizer.pt", out / LAST),
            f"{LAST}: is not of this training .its optimizer.pt has groups of .*; remove or replace that folder",
        ),
        (
            lambda out: shutil.copy(out / "checkpoints/checkpoint-1/adapter_model.safetensors", out / LAST),
            f"{LAST}: is not of this training .* of its tensors have other shapes.*; remove or replace that folder",
        ),
    ],
)
def test_what_a_run_cannot_go_on_without_is_named_with_the_ways_out(
    spoil: Callable[[Path], Any], words: str, places: Path, stopped: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    spoil(out)
    before = untouched(out / "checkpoints" / "compact")
    with pytest.raises(PatError, match=words):
        pat.tune(**flags(places, out))
    assert untouched(out / "checkpoints" / "compact") == before


@pytest.fixture(scope="module")
def stopped(places: Path, whole: tuple[Path, list[str]]) -> Path:
    """A run that was killed when it had saved the second step, in its second stage."""
    out, operations = places / "stopped", whole[1]
    moment = next(i for i, name in enumerate(operations, 1) if "compact/checkpoint-3" in name)
    faults.run(argv(places, out), out, moment)
    return out


def test_going_back_to_an_earlier_checkpoint_removes_the_later_ones_and_asks_the_base_nothing_again(
    places: Path, whole: tuple[Path, list[str]], stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    first = out / "checkpoints" / "checkpoint-1"
    run, base = RunFile.read(out), SimpleNamespace(dtype=torch.float32)
    assert run is not None
    scores = BaseScores.read(first.parent, run, cast(Any, base))
    assert scores is not None
    replace(scores, figures=replace(scores.figures, held_out_nll=1.25)).write(first.parent, run)
    result = pat.tune(**flags(places, out, resume_from_checkpoint=str(first)))
    assert "going on from checkpoints/checkpoint-1" in capfd.readouterr().err
    assert tensors(out) == tensors(whole[0])
    assert result.figures["base"].held_out_nll == 1.25
    assert [sample.base for sample in result.record.samples] == [answer for _, answer in scores.answers or []]


def test_another_tokenizer_does_not_go_on_with_a_run(places: Path, stopped: Path, tmp_path: Path) -> None:
    out, base = shutil.copytree(stopped, tmp_path / "out"), shutil.copytree(places / "base", tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<unk>"}))
    with pytest.raises(PatError, match=r"fingerprint of the tokens: [0-9a-f]{8} in the run, [0-9a-f]{8} given"):
        pat.tune(**flags(places, out) | {"model_name_or_path": str(base)})


def test_overwrite_removes_a_run_and_nothing_else(
    places: Path, whole: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = untouched(out)
    with pytest.raises(PatError, match=r"notes.txt is not from `pat tune`"):
        pat.tune(**flags(places, out, seed=1, overwrite=True))
    with pytest.raises(PatError, match="which it would remove"):
        (out / "notes.txt").unlink()
        pat.tune(**flags(places, out, overwrite=True, resume_from_checkpoint=str(out / "adapter")))
    with pytest.raises(PatError, match=r"held_out=.*which it would remove"):
        pat.tune(**flags(places, out, overwrite=True, held_out=str(out / "held_out.jsonl")))
    assert untouched(out).keys() == before.keys() - {str(out / "notes.txt")}
    pat.tune(**flags(places, out, seed=1, overwrite=True))
    assert tensors(out).keys() == tensors(whole[0]).keys() and tensors(out) != tensors(whole[0])
    foreign = tmp_path / "foreign"
    (foreign / "model").mkdir(parents=True)
    with pytest.raises(PatError, match=r"there is no run.json"):
        pat.tune(**flags(places, foreign, overwrite=True))
    with pytest.raises(PatError, match="not empty"):
        pat.tune(**flags(places, foreign))
    assert [path.name for path in foreign.iterdir()] == ["model"]


def test_what_a_disk_does_not_let_go_is_removed_by_the_next_command(
    places: Path, whole: tuple[Path, list[str]]
) -> None:
    """A part of an adapter stays beside it in `compact/` if it cannot be removed when the run ends."""
    moment = next(i for i, name in enumerate(whole[1], 1) if "os.remove /compact/.adapter" in name and "model" in name)
    survives(places, whole[0], moment, "refuse")


@pytest.mark.parametrize("fault", ["kill", "tear", "refuse"])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.85])
def test_a_fault_at_some_operations(share: float, fault: Fault, places: Path, whole: tuple[Path, list[str]]) -> None:
    out, operations = whole
    survives(places, out, int(share * len(operations)) + len(fault), fault)


def test_a_streamed_run_goes_on_where_it_was_in_the_data(places: Path) -> None:
    """Seven steps of two rows, of a source of ten, which begins again; killed in the second stage."""
    streams = {"streaming": "true", "max_steps": 7, "milestone": 0.3}
    out = places / "streamed"
    outcome = faults.run(argv(places, out, **streams), out)
    assert outcome.status == 0, outcome.said
    record = json.loads((out / "results.json").read_text())["data"]
    assert (record["is_streamed"], record["num_rows"], record["num_examples"]) == (True, 12, 10)
    saved = [number for number, line in enumerate(outcome.operations) if "checkpoint-5" in line]
    for moment in (saved[0] + 1, len(outcome.operations) - 5):
        survives(places, out, moment, "kill", **streams)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_every_fault_at_every_operation(recipe: str, tmp_path: Path, places: Path) -> None:
    """All of them (PAT_FAULTS_EVERY=1), or every so many; and a kill at forty moments."""
    if (every := int(os.environ.get("PAT_FAULTS_EVERY", "0"))) < 1:
        pytest.skip("takes hours on two cores: set PAT_FAULTS_EVERY=1 for all operations, 10 for every tenth")
    more = {"recipe": recipe, "axes": "auto"}
    if recipe == "paper":
        more |= {"axes": "hidden", "max_length": "192"}  # its prompts are longer
    out, whole, kept = places / recipe, tmp_path / "whole", tmp_path / "kept"
    kept.mkdir()
    outcome = faults.run(argv(places, out, **more), out)
    assert outcome.status == 0, outcome.said
    out.rename(whole)
    watched = faults.run(argv(places, out, **more), out, kept=kept)
    assert len(watched.operations) == len(outcome.operations) and tensors(out) == tensors(whole)
    shutil.rmtree(out)
    failed: list[str] = []

    def tried(name: str, trial: Callable[[], None]) -> None:
        try:
            trial()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
            shutil.rmtree(out, ignore_errors=True)
        else:
            print(f"{recipe}, {name}: survived", flush=True)

    def left_behind(state: Path) -> None:
        state.rename(out)
        goes_on(places, out, whole, **more)

    def killed_after(seconds: float) -> None:
        faults.run(argv(places, out, **more), out, seconds=seconds)
        goes_on(places, out, whole, **more)

    for state in sorted(kept.iterdir(), key=lambda path: int(path.name.partition("-")[0]))[::every]:
        moment = int(state.name.partition("-")[0])
        tried(f"{state.name} {outcome.operations[moment - 1]}", partial(left_behind, state))
    for moment in range(1, len(outcome.operations) + 1, every):
        name = f"{moment}-refuse {outcome.operations[moment - 1]}"
        tried(name, partial(survives, places, whole, moment, "refuse", **more))
    moments = random.Random(0)
    for number in range(1, 41, every):
        seconds = moments.uniform(0, outcome.seconds)
        tried(f"moment {number}, after {seconds:.2f} s", partial(killed_after, seconds))
    assert not failed, "\n".join(failed)
