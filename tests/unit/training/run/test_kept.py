"""An interruption says what is kept, by the files in the folder of the run."""

from pathlib import Path
from typing import Any

import pytest

from pat.training.arguments import build_arguments
from pat.training.run import kept
from pat.training.run.kept import telling_what_is_kept


def said(folder: Path, **flags: Any) -> str:
    arguments = build_arguments(model_name_or_path="base", dataset_name="data", output_dir=folder, bf16=False, **flags)
    with pytest.raises(KeyboardInterrupt) as found, telling_what_is_kept(arguments):
        raise KeyboardInterrupt
    return str(found.value)


def test_what_the_same_command_begins_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert said(out) == "nothing is kept yet: the same command begins anew"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "base.json").touch()
    assert said(out) == "no step is kept yet: the same command begins anew, with what the base has scored"
    checkpoint = out / "checkpoints" / "compact" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    assert said(out).startswith("no step is kept yet")  # of one that is torn nothing is gone on from
    assert said(out, resume_from_checkpoint=str(tmp_path)).endswith(f"begins at {tmp_path} again")
    monkeypatch.setattr(kept, "flaw", lambda path: None if path == checkpoint else "torn")
    assert said(out) == "the same command goes on from what is finished"
    assert said(out, overwrite=True) == "the same command without --overwrite goes on from what is finished"


def test_a_training_that_is_over_is_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "training.json").touch()
    assert "goes on" in said(tmp_path)
