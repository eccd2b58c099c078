"""A safetensors checkpoint on disk, read tensor by tensor into memory of the caller's.

By plain reads, not by a memory map: mapped pages count as the process's own memory for as long as the kernel likes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from pat.errors import PatError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in a safetensors header; those of weights that can be folded."""

STAGING_ELEMENTS = 2**23
"""How much is read at once where it has to be converted: 16 MB of bfloat16."""

PART_BYTES, READERS = 2**22, 4
"""How much of a tensor one thread reads at once, and how many threads do."""

_MAX_HEADER_BYTES = 100_000_000
"""The limit that the format sets itself."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype | None
    """None for one that is no floating-point number of 16 bits or more."""
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Checkpoint:
    """The tensors in one or more safetensors files.

    Args:
        files: the files.
        name: of the model, for messages.

    Raises:
        PatError: a file is missing, cut short, or not in the format.
    """

    def __init__(self, files: Iterable[Path], name: str) -> None:
        self.name = name
        self.files = sorted(set(files))
        self._open: dict[Path, BinaryIO] = {}
        self._readers = ThreadPoolExecutor(READERS)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            try:
                self.tensors |= _read_header(file)
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                raise self._unreadable(file, error) from error

    def read(self, name: str, out: Tensor, first: int = 0) -> None:
        """Copy elements `first` to `first + out.numel()` of a tensor into `out`, which is contiguous, in its dtype.

        Raises:
            PatError: the file cannot be read (any more).
        """
        stored = self.tensors[name]
        assert stored.dtype is not None, f"{name} is not a weight"
        flat = out.view(-1)
        try:
            file = self._file(stored.file)
            offset = stored.offset + first * stored.dtype.itemsize
            if out.dtype == stored.dtype and out.device.type == "cpu":
                self._fill(file, flat, offset)
                return
            staging = torch.empty(min(flat.numel(), STAGING_ELEMENTS), dtype=stored.dtype)
            for start in range(0, flat.numel(), STAGING_ELEMENTS):
                target = flat[start : start + STAGING_ELEMENTS]
                part = staging[: target.numel()]
                self._fill(file, part, offset + start * stored.dtype.itemsize)
                target.copy_(part)
        except (OSError, EOFError) as error:
            raise self._unreadable(stored.file, error) from error

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor from the disk, without waiting for it."""
        if hasattr(os, "posix_fadvise"):
            stored = self.tensors[name]
            descriptor = self._file(stored.file).fileno()
            os.posix_fadvise(descriptor, stored.offset, stored.num_bytes, os.POSIX_FADV_WILLNEED)

    def shard_bytes(self) -> int | None:
        """Return the size in bytes of the tensors in the largest file, None if there is but one file."""
        if len(self.files) == 1:
            return None
        sizes = dict.fromkeys(self.files, 0)
        for stored in self.tensors.values():
            sizes[stored.file] += stored.num_bytes
        return max(sizes.values())

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _fill(self, file: BinaryIO, flat: Tensor, offset: int) -> None:
        """Read a contiguous tensor's bytes from a place in a file, large ones in parts side by side.

        Even from the system's file cache a read is a copy, and one thread's copies were a fifth of the time of a merge.
        """
        view = memoryview(cast(Any, flat.view(torch.uint8).numpy()))
        if len(view) <= PART_BYTES or not hasattr(os, "preadv"):
            _fill_part(file, view, offset)
            return
        starts = range(0, len(view), PART_BYTES)
        reads = self._readers.map(
            lambda start: _fill_part(file, view[start : start + PART_BYTES], offset + start), starts
        )
        list(reads)

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._open:
            self._open[path] = cast(BinaryIO, path.open("rb", buffering=0))
        return self._open[path]

    def _unreadable(self, file: Path, error: Exception) -> PatError:
        detail = " ".join(str(error).split())
        return PatError(f"Could not load the model {self.name!r}: {file.name} is not readable ({detail}).")


def open_checkpoint(name_or_path: str) -> Checkpoint | None:
    """Open the safetensors files of a model folder or hub id, None if it has none.

    Raises:
        PatError: there are such files, but they cannot be read.
    """
    files = _checkpoint_files(name_or_path)
    return None if files is None else Checkpoint(files, name_or_path)


def _checkpoint_files(name_or_path: str) -> list[Path] | None:
    options: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **options)
        if single is not None:
            return [Path(single)]
        index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **options)
        if index is None:
            return None
        files, _ = get_checkpoint_shard_files(name_or_path, index)
    except (OSError, ValueError, KeyError) as error:
        detail = str(error).strip().split("\n")[0]
        raise PatError(f"Could not load the model {name_or_path!r}: {detail}") from error
    return [Path(file) for file in files]


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("its header is cut short")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"it is cut short, {name} lies beyond its end")
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is not None and dtype.itemsize * torch.Size(shape).numel() != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes, which is not its shape {shape} in {entry['dtype']}")
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + begin, end - begin)
    return tensors


def _fill_part(file: BinaryIO, view: memoryview, offset: int) -> None:
    while view:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [view], offset)
        else:  # on Windows
            file.seek(offset)
            count = cast(Any, file).readinto(view)
        if not count:
            raise EOFError("it ends too early")
        view, offset = view[count:], offset + count
