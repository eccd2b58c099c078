"""Output folders that appear complete or not at all, whenever a run ends."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pat.errors import PatError
from pat.paths import check_writable
from pat.whole_files import STAGED, sync_folder

if sys.platform != "win32":
    import fcntl


def check_output_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Return an output folder's path if it may be written to: it does not exist, or is empty.

    Raises:
        PatError: there is something at that path, or it cannot be written.
    """
    path = Path(output_dir)
    try:
        if path.is_dir():
            if any(path.iterdir()):
                raise PatError(f"{path}: the output folder is not empty; choose another one, or empty it first.")
        elif path.exists() or path.is_symlink():
            raise PatError(f"{path}: is not a folder; expected a new or empty output folder.")
    except OSError as error:  # such as a name that is too long, or a folder that may not be looked into
        raise PatError(f"{str(path)[:300]}: cannot be used ({error.strerror}); give another folder.") from error
    check_writable(path)
    return path


@contextmanager
def staged_folder(output_dir: str | os.PathLike[str], *, replaces: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `output_dir` that takes its name if the block ends well and vanishes otherwise.

    Before it takes the name everything in it is on the disk. What runs that were killed have left beside the same
    `output_dir` is removed first. With `replaces`, so is a folder that has the name, when the new one is ready.

    Raises:
        PatError: something is at `output_dir` already, or no folder can be made there.
    """
    target = Path(os.path.realpath(output_dir if replaces else check_output_folder(output_dir)))
    prefix = f".{target.name}{STAGED}"
    _remove_stale(target.parent, prefix)
    # Ancestors that are made now go again if nothing comes of it.
    made = [folder for folder in target.parents if not folder.exists()]
    staging: Path | None = None
    lock: int | None = None
    try:
        try:
            staging, lock = _make_locked(target.parent, prefix)
        except OSError as error:
            raise PatError(f"{target}: cannot be created ({error.strerror}); choose another output folder.") from error
        yield staging
        make_readable(staging)
        sync(staging)
        if replaces and target.is_dir() and any(target.iterdir()):
            discard(target)
        _rename(staging, target)
        sync_folder(target.parent)
    except BaseException:  # an interrupt must leave nothing behind either
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Yield a file of the same name in a hidden folder beside it, which takes its place if the block ends well.

    Other files that are written beside it go along, under their own names, and are in place before it is.

    Raises:
        PatError: one of them exists already, or no folder can be made there.
    """
    hidden = output.with_name(f".{output.name}{STAGED}files")
    with staged_folder(hidden) as staging:
        yield staging / output.name
        files = sorted(staging.iterdir(), key=lambda file: file.name == output.name)
        for place in (output.with_name(file.name) for file in files):
            if place.exists():
                raise PatError(f"{place}: exists already; give another name, or remove it first.")
        make_readable(staging)
        sync(staging)
        for file in files:
            os.replace(file, output.with_name(file.name))
    hidden.rmdir()


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Make a folder and mark it as in use, see `lock_folder`; if somebody who clears up comes between, another one."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        with suppress(FileNotFoundError, BlockingIOError):
            lock = lock_folder(folder)
            if lock is None or folder.is_dir():
                return folder, lock
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Mark a folder as in use until the descriptor returned is closed; None where the system cannot lock folders.

    Raises:
        BlockingIOError: somebody else has marked it.
    """
    if sys.platform == "win32":  # folders can be neither opened nor locked there
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # such as some network file systems
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove the staging folders of processes that are no more: nobody holds their lock."""
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or not folder.is_dir():
            continue
        with suppress(OSError):
            lock = lock_folder(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def discard(folder: Path) -> None:
    """Remove a folder, if there is one, so that no part of it is ever left under its name."""
    if folder.is_dir():
        aside = folder.with_name(f".{folder.name}{STAGED}{secrets.token_hex(4)}")
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove what killed processes have left in a folder, of things so named; nobody else may be writing there."""
    for path in folder.glob(f".*{STAGED}*") if folder.is_dir() else ():
        name = path.name.removeprefix(".").rpartition(STAGED)[0]
        if names is not None and name not in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def make_readable(folder: Path) -> None:
    """Give files the permissions of any new file; safetensors makes its own readable by their owner alone."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    probe.touch()  # the only way to know the permissions of a new file without changing them for other threads
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def sync(folder: Path) -> None:
    """Have everything in a folder on the disk, so that its name cannot outlive its contents in a power failure."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _rename(staging: Path, target: Path) -> None:
    try:
        if target.is_dir():
            target.rmdir()  # empty; on Windows a rename does not replace it
        os.replace(staging, target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        # A mount point can neither be removed nor replaced: fill it, the configuration last.
        files = sorted(staging.iterdir(), key=lambda file: file.name == "config.json")
        try:
            for file in files:
                shutil.move(file, target / file.name)
        except BaseException:
            for file in files:
                (target / file.name).unlink(missing_ok=True)
            raise
        staging.rmdir()
