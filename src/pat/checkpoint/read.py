"""A safetensors checkpoint on disk, of which one tensor or a part of one is mapped into memory at a time.

To map whole files would be simpler, but mapped pages count as the process's own memory for as long as the kernel likes.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

WINDOW_ELEMENTS = 2**23
"""How much is mapped at once where it is copied: 16 MB of bfloat16."""

_ASKED_BYTES = 2**17
"""How much the system is asked for at once: Linux reads no more than its read-ahead size, 128 kB by default."""

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
        self._asking = ThreadPoolExecutor(1)  # a disk with enough to do has those wait who ask for more
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            try:
                self.tensors |= _read_header(file)
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                raise self._unreadable(file, error) from error

    def mapped(self, name: str, first: int = 0, numel: int | None = None) -> Tensor:
        """Return elements `first` to `first + numel` of a tensor, flat, in its dtype, as they lie in the file's cache.

        Nothing is copied but what is written to, and that does not reach the file. The pages count as the process's own
        memory until the last tensor that shares them is gone.

        Raises:
            PatError: the file cannot be opened, or has become too short. What happens to it afterwards, and a disk that
                fails, ends the process, as it does wherever files are mapped.
        """
        stored = self.tensors[name]
        assert stored.dtype is not None, f"{name} is not a weight"
        numel = torch.Size(stored.shape).numel() - first if numel is None else numel
        if numel == 0:
            return torch.empty(0, dtype=stored.dtype)
        offset = stored.offset + first * stored.dtype.itemsize
        before = offset % mmap.ALLOCATIONGRANULARITY
        length = before + numel * stored.dtype.itemsize
        try:
            descriptor = self._file(stored.file).fileno()
            pages = mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=offset - before)
        except ValueError as error:  # what is mapped has to be there
            raise self._unreadable(stored.file, EOFError("it ends too early")) from error
        except OSError as error:
            raise self._unreadable(stored.file, error) from error
        return torch.frombuffer(pages, dtype=stored.dtype, count=numel, offset=before)

    def read(self, name: str, out: Tensor, first: int = 0) -> None:
        """Copy elements `first` to `first + out.numel()` of a tensor into `out`, which is contiguous, in its dtype.

        Raises:
            PatError: see `mapped`.
        """
        for index, part in enumerate(out.view(-1).split(WINDOW_ELEMENTS)):
            part.copy_(self.mapped(name, first + index * WINDOW_ELEMENTS, part.numel()))

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor from the disk, without waiting until it has."""
        stored = self.tensors[name]
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # reading will tell
                descriptor = self._file(stored.file).fileno()
                self._asking.submit(_ask_for, descriptor, stored.offset, stored.num_bytes)

    def shard_bytes(self) -> int | None:
        """Return the size in bytes of the tensors in the largest file, None if there is but one file."""
        if len(self.files) == 1:
            return None
        sizes = dict.fromkeys(self.files, 0)
        for stored in self.tensors.values():
            sizes[stored.file] += stored.num_bytes
        return max(sizes.values())

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._asking.shutdown(cancel_futures=True)
        self._asking = ThreadPoolExecutor(1)
        for file in self._open.values():
            file.close()
        self._open.clear()

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


def _ask_for(descriptor: int, offset: int, num_bytes: int) -> None:
    with suppress(OSError):  # the file may have been closed meanwhile; then nobody needs it any more
        for start in range(offset, offset + num_bytes, _ASKED_BYTES):
            length = min(_ASKED_BYTES, offset + num_bytes - start)
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
