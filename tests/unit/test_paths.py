"""Names that are like one that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pat.errors import PatError
from pat.named import check_dataset
from pat.paths import near


@pytest.mark.parametrize(
    ("name", "folder", "found"),
    [
        ("tran.csv", False, ["train.csv"]),
        ("train", None, ["train.csv"]),
        ("TRAIN.CSV", False, ["train.csv"]),
        ("tran.csv", True, []),
        ("ouy/model", True, ["out/model"]),
        ("ouy/modle", True, []),
        ("out/modle", True, ["out/model"]),
        ("nothing-like-it.csv", None, []),
        ("train.csv/inner", None, []),
        ("train.csv", None, []),
        ("a\0b", None, []),
        ("helo.txt", None, []),
    ],
)
def test_what_is_there_and_alike_is_named_as_it_was_typed(
    name: str, folder: bool | None, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "train.csv").touch()
    (tmp_path / "hel\x1bo.txt").touch()  # would speak to the terminal
    monkeypatch.chdir(tmp_path)
    assert near(name, folder=folder) == (f" (did you mean {' or '.join(found)}?)" if found else "")
    absolute = [str(tmp_path / each) for each in found]
    assert near(tmp_path / name, folder=folder) == (f" (did you mean {' or '.join(absolute)}?)" if found else "")


def test_a_dataset_with_a_misspelt_ending_beside_its_file_is_no_id_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.csv").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PatError, match=r"train\.cvs: no such file \(did you mean train\.csv\?\)"):
        check_dataset("train.cvs")
    for name in ("train", "squad.v2", "me/train.cvs", "task:train.cvs"):
        check_dataset(name)
