"""What a killed run leaves beside its target goes with the next run; what a living one writes stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pat.checkpoint import staging
from pat.checkpoint.staging import discard, lock_folder, remove_unfinished, staged_folder
from pat.whole_files import write_whole


def staging_folders(parent: Path) -> list[Path]:
    return sorted(parent.glob(".out.tmp-*"))


def start_writer(target: Path) -> subprocess.Popen[str]:
    """Start a process that is in the middle of writing when this returns."""
    code = f"""
        import sys
        from pat.checkpoint.staging import staged_folder
        with staged_folder({str(target)!r}) as folder:
            (folder / "half").write_text("half")
            print("writing", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_killed_writer_leaves_no_target_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "out")
    writer.kill()
    writer.communicate()
    assert not (tmp_path / "out").exists()
    stale = staging_folders(tmp_path)
    assert len(stale) == 1
    (tmp_path / ".other.tmp-0").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
        assert staging_folders(tmp_path) == [folder] != stale
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp-0", "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are of another kind there")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_any_other(umask: int, tmp_path: Path) -> None:
    """safetensors makes its own readable by their owner alone."""
    before = os.umask(umask)
    try:
        with staged_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir()
            save_file({"a": torch.ones(1)}, folder / "inner" / "model.safetensors")
    finally:
        os.umask(before)
    (file,) = (tmp_path / "out" / "inner").iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inner"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_a_folder_that_is_cleared_up_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[Path] = []

    def lock_too_late(folder: Path) -> int | None:
        if len(cleared) < 3:
            held = lock_folder(folder)  # by the process that clears up
            cleared.append(folder)
            late = os.open(folder, os.O_RDONLY)
            shutil.rmtree(folder)
            if len(cleared) == 1:  # it is not there any more
                return lock_folder(folder)
            if len(cleared) == 2:  # it is being removed
                raise BlockingIOError
            os.close(held or 0)
            return late  # it was opened before, and locked after it was removed
        return lock_folder(folder)

    monkeypatch.setattr(staging, "lock_folder", lock_too_late)
    with staged_folder(tmp_path / "out") as folder:
        assert len(cleared) == 3 and folder not in cleared
        (folder / "whole").write_text("whole")
    assert (tmp_path / "out" / "whole").read_text() == "whole"


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "out")
    (folder,) = staging_folders(tmp_path)
    with pytest.raises(KeyError), staged_folder(tmp_path / "out"):
        raise KeyError
    assert staging_folders(tmp_path) == [folder]
    writer.communicate("")
    assert writer.returncode == 0
    assert (tmp_path / "out" / "half").read_text() == "half"


def test_a_folder_is_replaced_only_by_one_that_is_ready(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyError), staged_folder(tmp_path / "out", replaces=True) as folder:
        (folder / "new").touch()
        raise KeyError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    with staged_folder(tmp_path / "out", replaces=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    discard(tmp_path / "out")
    discard(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "in" / "a.json", "one")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):

        def full(descriptor: int) -> None:
            raise OSError("full")

        patch.setattr(os, "fsync", full)
        write_whole(tmp_path / "in" / "a.json", "two")
    assert [path.read_text() for path in (tmp_path / "in").iterdir()] == ["one"]


def test_unfinished_things_are_known_by_their_names(tmp_path: Path) -> None:
    for name in (".model.tmp-1", ".notes.tmp-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".run.json.tmp-2").touch()
    remove_unfinished(tmp_path, ("model", "run.json"))
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp-1"]
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
