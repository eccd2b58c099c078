"""Write a safetensors checkpoint tensor by tensor, in any order: sizes are known beforehand, so headers come first.

Files, names and index are those of transformers' `save_pretrained`. safetensors itself writes a file only when it has
all its tensors, which would hold a file of 5 GB in memory.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pat.checkpoint.layout import stored_layout
from pat.errors import RunFailed, one_line
from pat.loading.stored import DTYPES

_NO_SUCH_CALL = (errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP)
"""Error numbers of file systems that cannot reserve space (FUSE, NFS), although writing works there."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """The weight files of a model, as a context: on leaving it, every tensor has been written.

    The folder exists; the model has the right structure, whatever its parameters hold.

    Raises:
        RunFailed: the disk is full, or cannot be written to; or (on leaving) a tensor was not written.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype, *, max_shard_size: int | str) -> None:
        self._layout, self._dtype = stored_layout(model), dtype
        stored = {
            piece.name: torch.empty(piece.shape, dtype=dtype, device="meta")
            for pieces in self._layout.values()
            for piece in pieces
        }
        pattern = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=max_shard_size)
        self._missing = set(self._layout)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files = ExitStack()
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
            self._files.close()
            raise writing_failed(error) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()
        if kind is None and self._missing:
            raise RunFailed(f"{len(self._missing)} weights were not written, such as {min(self._missing)}.")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a parameter of the model.

        Raises:
            RunFailed: it does not belong to the model, or cannot be written.
        """
        pieces = self._layout.get(name)
        if pieces is None or name not in self._missing or sum(p.numel for p in pieces) != tensor.numel():
            raise RunFailed(f"The folded weights do not fit the dense model: {name} of shape {tuple(tensor.shape)}.")
        self._missing.remove(name)
        flat = tensor.detach().to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8)
        size = self._dtype.itemsize
        try:
            for piece in pieces:
                file, offset = self._places[piece.name]
                file.seek(offset)
                view = memoryview(cast(Any, flat[piece.start * size : (piece.start + piece.numel) * size].numpy()))
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            raise writing_failed(error) from error

    def _create(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a file's header and reserve its space, so that a full disk shows at once."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors):
            begin, end = end, end + tensors[name].nbytes
            shape = list(tensors[name].shape)
            entries[name] = {"dtype": _NAMES[self._dtype], "shape": shape, "data_offsets": [begin, end]}
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)  # tensors begin at multiples of eight bytes
        file = cast(BinaryIO, self._files.enter_context(path.open("w+b", buffering=0)))
        file.write(struct.pack("<Q", len(header)) + header)
        start = file.tell()
        if hasattr(os, "posix_fallocate") and end:
            try:
                os.posix_fallocate(file.fileno(), 0, start + end)
            except OSError as error:
                if error.errno not in _NO_SUCH_CALL:
                    raise
        self._places |= {name: (file, start + entries[name]["data_offsets"][0]) for name in tensors}


def writing_failed(error: Exception) -> RunFailed:
    """Return the error for a checkpoint that the disk does not take."""
    return RunFailed(f"Writing the checkpoint failed ({one_line(error)}).")
