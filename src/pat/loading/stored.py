"""The tensors in a model's safetensors files, as their headers describe them; none is read."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from pat.errors import PatError, one_line

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in a safetensors header; those of weights that can be folded."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    file: Path
    dtype: torch.dtype | None
    """None for one that is no floating-point number of 16 bits or more."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


def stored_tensors(
    name_or_path: str, *, revision: str | None = None, download: bool = False
) -> dict[str, StoredTensor] | None:
    """Return the tensors in the safetensors files of a model folder or hub id by name, None if it has no such file.

    Files of a hub id that are not on this machine are left there, unless `download` fetches them.

    Raises:
        PatError: there are such files, but they cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(_files(name_or_path, revision, download))):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    entry = opened.get_slice(name)
                    tensors[name] = StoredTensor(file, DTYPES.get(entry.get_dtype()), tuple(entry.get_shape()))
        except (OSError, SafetensorError) as error:
            raise unreadable(name_or_path, file, error) from error
    return tensors or None


def dtype_of(tensors: dict[str, StoredTensor]) -> torch.dtype | None:
    """Return the dtype that most weights are stored in, None if none is a floating-point number of 16 bits or more."""
    sizes: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        if tensor.dtype is not None and ".weight." not in name:  # those belong to a quantised weight
            sizes[tensor.dtype] += tensor.numel
    return sizes.most_common(1)[0][0] if sizes else None


def unreadable(name_or_path: str, file: Path, error: Exception) -> PatError:
    """Return the error for a weight file that cannot be read."""
    return PatError(f"Could not load the model {name_or_path!r}: {file.name} is not readable ({one_line(error)}).")


def _check_index(name_or_path: str, index: Path) -> None:
    """Refuse an index that names other files than those beside it; the hub's cache links to its own store of them.

    Raises:
        PatError: it does, or is not readable.
    """
    try:
        stored = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(name_or_path, index, error) from error
    given: dict[str, Any] = stored if isinstance(stored, dict) else {"the index": stored}
    names: Any = given.get("weight_map")
    for is_wrong, field, expected in (
        (given is not stored, "the index", "a mapping"),
        (not (isinstance(names, dict) and names), "weight_map", "the name of a file for each tensor"),
        (not isinstance(given.get("metadata"), dict), "metadata", "a mapping, which may be empty"),
    ):
        if is_wrong:
            got = f"{field}={given[field]!r}" if field in given else f"no {field}"
            raise _wrong_index(name_or_path, index, f"got {got[:100]}; expected {expected}")
    files: dict[str, Path] = {}
    for tensor, name in names.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise _wrong_index(name_or_path, index, f"got {name!r} for {tensor}; expected the name of a file")
        files[name] = (index.parent / name).resolve()
    folder = index.parent.resolve()
    store = index.parent.parent.parent / "blobs" if index.parent.parent.name == "snapshots" else folder
    for name, place in sorted(files.items()):
        if len(Path(name).parts) != 1 or not (place.is_relative_to(folder) or place.parent == store.resolve()):
            raise _wrong_index(
                name_or_path,
                index,
                f"got the file {name!r}, which does not lie in the model's own folder; expected names of files beside "
                "the index",
            )


def _wrong_index(name_or_path: str, index: Path, reason: str) -> PatError:
    return PatError(f"Could not load the model {name_or_path!r}: {index.name} is not usable: {reason}.")


def stored_file(name_or_path: str, file: str, revision: str | None, *, download: bool = False) -> Path | None:
    """Return where a file of a model lies on this machine; None if it is not there."""
    found = cached_file(
        name_or_path,
        file,
        revision=revision,
        local_files_only=not download,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _files(name_or_path: str, revision: str | None, download: bool) -> list[Path]:
    try:
        single = stored_file(name_or_path, SAFE_WEIGHTS_NAME, revision, download=download)
        if single is not None:
            return [single]
        index = stored_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, revision, download=download)
        if index is None:
            return []
        _check_index(name_or_path, index)
        files, _ = get_checkpoint_shard_files(name_or_path, index, revision=revision, local_files_only=not download)
    except PatError:
        raise
    except (OSError, ValueError, KeyError) as error:
        if not download and not os.path.isdir(name_or_path):
            return []  # a model of the hub, of which not all is here
        detail = str(error).strip().split("\n")[0]
        raise PatError(f"Could not load the model {name_or_path!r}: {detail}") from error
    return [Path(file) for file in files]
