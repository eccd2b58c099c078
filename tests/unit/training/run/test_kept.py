"""What an interruption leaves is said by what lies in the folder."""

from pathlib import Path

import pytest

from pat.training.run.kept import telling_what_is_kept


def said(folder: Path) -> str:
    with pytest.raises(KeyboardInterrupt) as found, telling_what_is_kept(folder):
        raise KeyboardInterrupt
    return str(found.value)


def test_what_the_same_command_begins_with_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert said(out) == "nothing is kept yet: the same command begins anew"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "base.json").touch()
    assert said(out) == "no step is kept yet: the same command begins anew, with what the base has scored"
    (out / "checkpoints" / "compact" / "checkpoint-2").mkdir(parents=True)
    assert said(out) == "the same command goes on from what is finished"


def test_a_training_that_is_over_is_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "training.json").touch()
    assert "goes on" in said(tmp_path)
