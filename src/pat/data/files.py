"""The data files of a local folder: to which split each belongs, and what in the folder is not read."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import metadata_load

from pat.checkpoint.card import shown_name
from pat.errors import PatError, one_line, reason_of
from pat.readers import READERS, SUFFIXES, data_suffix

logger = logging.getLogger(__name__)

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that say of which split they are, as `datasets` understands them."""

NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files with the suffix of data that tell of data, or of a model."""

ABOUT = {"README.md", "LICENSE"}
"""Files that nobody takes for data, so that nothing is said of them."""

MOST_NAMED = 10
"""Names of files in one line."""

_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^.]*\.")


def has_own_loading(folder: Path) -> bool:
    """Tell whether a folder says itself how its files are read: it has a dataset card with configurations."""
    card = folder / "README.md"
    try:
        return card.is_file() and bool((metadata_load(card) or {}).get("configs"))
    except Exception as error:  # its YAML parser raises errors of its own at a file that is no card
        logger.warning("%s: is no dataset card (%s), and is passed over.", shown_name(str(card)), one_line(error))
        return False


def is_saved(folder: Path) -> bool:
    """Tell whether a folder holds what `save_to_disk` of `datasets` leaves."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path) -> dict[str, Dataset]:
    """Return the parts of what `save_to_disk` has left, by their names; `train` is that of a dataset without parts.

    Raises:
        PatError: a file of it is missing or torn.
    """
    try:
        stored = load_from_disk(str(folder))
    except Exception as error:  # whatever its readers of JSON and Arrow raise
        raise PatError(
            f"{folder}: is no whole dataset of `save_to_disk` ({reason_of(error)}); save it again."
        ) from error
    return {str(name): rows for name, rows in stored.items()} if isinstance(stored, DatasetDict) else {"train": stored}


def data_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder and its subfolders, in the order of their names, by the split they belong to.

    A sole data file is all there is, and of the split `train`, whatever it is called.

    Raises:
        PatError: there is none.
    """
    files = [path for path in _files_of(folder) if _is_data(path)]
    if not files:
        raise PatError(f"{folder}: is a folder without a data file; expected one in it ({SUFFIXES}).")
    if len(files) == 1:
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(split_of(path.relative_to(folder)), []).append(path)
    return splits


def fingerprint_of(files: Sequence[Path], of_one: Callable[[Path], str]) -> str:
    """Return the fingerprint of files: that of the one, or a digest of those of all, in their order."""
    known = [of_one(path) for path in files]
    return known[0] if len(known) == 1 else f"sha256:{hashlib.sha256(' '.join(known).encode()).hexdigest()}"


def say_unread(folder: Path, read: list[Path]) -> None:
    """Warn in one line of the files of a folder that are not read."""
    known = set(read)
    others = [
        (path, path.relative_to(folder)) for path in _files_of(folder) if path not in known and path.name not in ABOUT
    ]
    if others:
        shown = [
            f"{_plain(own)} (split {split_of(own)!r})" if _is_data(path) else _plain(own)
            for path, own in others[:MOST_NAMED]
        ]
        more = f" and {len(others) - MOST_NAMED:,} more" if len(others) > MOST_NAMED else ""
        what = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
        logger.warning("%s: %s not read: %s%s.", shown_name(str(folder)), what, ", ".join(shown), more)


def split_of(path: Path) -> str:
    """Return the split that the path of a file names, its folders before its own name; or else `train`."""
    shard = _SHARD.match(path.name)
    if shard and path.parts[0] == "data" and len(path.parts) == 2:
        return shard[1]
    for name in path.parts:
        words = re.split(r"[-._ 0-9]+", name.lower())
        for split, keywords in KEYWORDS.items():
            if not set(keywords).isdisjoint(words):
                return split
    return "train"


def _plain(path: Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))


def _is_data(path: Path) -> bool:
    return (
        path.is_file() and path.name not in NO_DATA and not path.name.startswith(".") and data_suffix(path) in READERS
    )


def _files_of(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders by their paths, hidden ones only if they look like data."""
    found: list[Path] = []
    known: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in known:  # a link may lead back
            folders.clear()
            continue
        known.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if name[0] != "." or data_suffix(Path(name)) in READERS]
    return sorted(found)
