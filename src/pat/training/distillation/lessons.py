"""What a teacher says of the rows of a run, on disk: its likeliest tokens at each scored position, asked for once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from pat.checkpoint.staging import staged_folder
from pat.errors import RunFailed
from pat.method.divergence import bucketed_divergence, largest
from pat.nll import Example, batches_from_examples
from pat.report.progress import progress_bar
from pat.training.distillation.distill import ROWS, Teacher, scored_positions

TOKENS, LOG_PROBS = "tokens.npy", "log_probs.npy"
"""Files of `(P, K)` int32 and `(P, K + 1)` float32, P the scored positions of all rows that differ."""


@dataclass(frozen=True)
class Places:
    """Where the lessons of each row begin; rows are known by their tokens and by which of them are learned."""

    starts: Mapping[bytes, int]
    num_positions: int

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Places:
        """Give rows that differ their places, in the order in which they come."""
        starts: dict[bytes, int] = {}
        total = 0
        for row in rows:
            ids, scored = torch.tensor(row["input_ids"]), scored_positions(torch.tensor(row["labels"]))
            key = _key(ids, scored)
            if key not in starts:
                starts[key] = total
                total += int(scored.sum())
        return cls(starts, total)

    def num_bytes(self, num: int) -> int:
        """Return how large the files are for the `num` likeliest tokens."""
        return self.num_positions * (4 * num + 4 * (num + 1))

    def name(self, num: int, teacher: str) -> str:
        """Return a name for the folder of the files, another one for other rows, another number or another teacher."""
        digest = hashlib.sha256(f"{num} {teacher}".encode())
        for key in self.starts:
            digest.update(key)
        return f"teacher-{digest.hexdigest()[:16]}"

    def of_batch(self, inputs: Mapping[str, Any], scored_BT: Tensor) -> list[slice]:
        """Return the places of each row of a padded batch.

        Raises:
            RunFailed: the teacher has never seen one of them.
        """
        ids_BT, mask_BT = inputs["input_ids"].cpu(), inputs.get("attention_mask")
        scored_BT = scored_BT.cpu()
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.cpu()
        found = []
        for ids_T, scored_T, mask_T in zip(ids_BT, scored_BT, mask_BT.bool(), strict=True):
            start = self.starts.get(_key(ids_T[mask_T], scored_T[mask_T]))
            if start is None:
                raise RunFailed(f"A row of {int(mask_T.sum())} tokens is none of those that the teacher was asked for.")
            found.append(slice(start, start + int(scored_T.sum())))
        return found


class LessonsOnDisk:
    """A teacher's likeliest tokens, read from disk as they are needed; all others count as one token.

    Args:
        folder: of the files, as `write_lessons` has made it.
        places: of the rows in it.
    """

    def __init__(self, folder: Path, places: Places) -> None:
        self.places = places
        self.num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        self._files = [np.load(folder / name, mmap_mode="r") for name in (TOKENS, LOG_PROBS)]

    def look(self, inputs: Mapping[str, Any], scored_BT: Tensor) -> tuple[Tensor, ...]:
        """Return tokens `(N, K)` and log-probabilities `(N, K + 1)` of the scored positions."""
        places = self.places.of_batch(inputs, scored_BT)
        read = (np.concatenate([file[place] for place in places]) for file in self._files)
        return tuple(torch.from_numpy(values).to(scored_BT.device) for values in read)

    def divergence(self, logits_NV: Tensor, *looked: Tensor) -> Tensor:
        """Return a lower bound of the divergence, see `bucketed_divergence`."""
        return bucketed_divergence(logits_NV, *looked)


@torch.no_grad()
def write_lessons(
    folder: Path,
    rows: Sequence[Example],
    places: Places,
    teacher: Teacher,
    num: int,
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: bool,
) -> None:
    """Ask a teacher for its `num` likeliest tokens over all rows; the folder appears complete or not at all."""
    num_batches = -(-len(rows) // batch_size)
    with staged_folder(folder) as staging, progress_bar("Asking the teacher", "batches", shown=progress) as bar:
        tokens = open_memmap(staging / TOKENS, mode="w+", dtype=np.int32, shape=(places.num_positions, num))
        shape = (places.num_positions, num + 1)
        log_probs = open_memmap(staging / LOG_PROBS, mode="w+", dtype=np.float32, shape=shape)
        batches = batches_from_examples(rows, batch_size=batch_size, pad_token_id=pad_token_id, sort_by_length=True)
        for done, batch in enumerate(batches, start=1):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            scored_BT = scored_positions(inputs.pop("labels"))
            with autocast():
                (states_ND,) = teacher.look(inputs, scored_BT)
                parts = [largest(teacher.logits(part), num) for part in states_ND.split(ROWS)]
            said = [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]
            begin = 0
            for place in places.of_batch(inputs, scored_BT):
                rows_here = slice(begin, begin := begin + place.stop - place.start)
                tokens[place], log_probs[place] = said[0][rows_here], said[1][rows_here]
            bar(done, num_batches)
        for file in (tokens, log_probs):
            cast(Any, file).flush()


def _key(ids_T: Tensor, scored_T: Tensor) -> bytes:
    digest = hashlib.blake2b(ids_T.int().numpy().tobytes(), digest_size=16)
    digest.update(scored_T.numpy().tobytes())
    return digest.digest()
