"""Write a safetensors checkpoint tensor by tensor, in any order: sizes are known beforehand, so headers come first.

Files, names and index are those of transformers' `save_pretrained`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pat.checkpoint.layout import Piece, stored_layout
from pat.checkpoint.read import DTYPES
from pat.errors import RunFailed

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """The weight files of a model, as a context: on leaving it, all of them are on the disk.

    Writing runs in a thread of its own, beside the computation of the next tensor; so does waiting for the disk, once a
    file has all its tensors.

    Args:
        folder: where the files go; it exists.
        model: of the right structure, whatever its parameters hold.
        dtype: of the tensors.
        max_shard_size: size limit of one file, in bytes or such as `"5GB"`.

    Raises:
        RunFailed: the disk is full, or cannot be written to.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype, *, max_shard_size: int | str) -> None:
        self._layout = stored_layout(model)
        stored = {
            piece.name: torch.empty(piece.shape, dtype=dtype, device="meta")
            for name, pieces in self._layout.items()
            for piece in pieces
        }
        pattern = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=max_shard_size)
        self._dtype = dtype
        self._missing = set(self._layout)
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._pool, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._lacking: dict[BinaryIO, int] = {}
        self._syncs: list[Future[None]] = []
        try:
            for filename, names in split.filename_to_tensors.items():
                self._create(folder / filename, {name: stored[name] for name in names})
            if split.is_sharded:
                index = {
                    "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
                    "weight_map": split.tensor_to_filename,
                }
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        except OSError as error:
            self._close()
            raise _failed(error) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                if self._missing:
                    raise RunFailed(f"{len(self._missing)} weights were not written, such as {min(self._missing)}.")
                for sync in self._syncs:
                    sync.result()
        except OSError as problem:
            raise _failed(problem) from problem
        finally:
            self._close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a parameter of the model; it must not be changed afterwards.

        Raises:
            RunFailed: it does not belong to the model, or the one before could not be written.
        """
        pieces = self._layout.get(name)
        if pieces is None or name not in self._missing or sum(p.numel for p in pieces) != tensor.numel():
            raise RunFailed(f"The folded weights do not fit the dense model: {name} of shape {tuple(tensor.shape)}.")
        self._missing.remove(name)
        # One tensor on its way to the disk at a time, or a slow disk would have them pile up in memory.
        self._wait()
        self._pending = self._pool.submit(self._write, pieces, tensor)

    def _write(self, pieces: tuple[Piece, ...], tensor: Tensor) -> None:
        flat = tensor.detach().to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8)
        size = self._dtype.itemsize
        for piece in pieces:
            file, offset = self._places[piece.name]
            file.seek(offset)
            view = memoryview(cast(Any, flat[piece.start * size : (piece.start + piece.numel) * size].numpy()))
            while view:
                view = view[file.write(view) :]
            self._lacking[file] -= 1
            if not self._lacking[file]:
                self._syncs.append(self._syncing.submit(os.fsync, file.fileno()))

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except OSError as error:
                raise _failed(error) from error

    def _create(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a file's header and reserve its space, so that a full disk shows at once."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins: dict[str, int] = {}
        end = 0
        for name in sorted(tensors):
            tensor = tensors[name]
            begins[name] = end
            end += tensor.numel() * tensor.itemsize
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begins[name], end],
            }
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)  # tensors begin at multiples of eight bytes
        file = path.open("wb", buffering=0)
        self._files.append(file)
        self._lacking[file] = len(tensors)
        file.write(struct.pack("<Q", len(header)) + header)
        start = file.tell()
        if hasattr(os, "posix_fallocate") and end:
            os.posix_fallocate(file.fileno(), 0, start + end)
        for name, begin in begins.items():
            self._places[name] = (file, start + begin)

    def _close(self) -> None:
        for pool in (self._pool, self._syncing):
            pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files:
            file.close()


def _failed(error: OSError) -> RunFailed:
    return RunFailed(f"Writing the checkpoint failed ({' '.join(str(error).split())}).")
