"""What encoded examples have and lose, counted in one pass over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset

from pat.data.conversion import ROW
from pat.data.tables import batches_of
from pat.report.progress import Phase, phase

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Counts:
    """Counts of encoded examples; the arrays have a number for each that is there, those that were refused left out."""

    indices: npt.NDArray[np.int64]
    """Where these examples stand in the table."""
    num_tokens: Numbers
    """Tokens before the cut."""
    num_targets: Numbers
    """Those of them that are to be learned."""
    num_left: Numbers
    """Those of them that are left after the cut."""
    largest_token: int
    ends: Counter[int]
    """How often each token ends what is to be learned, before the cut; see `EndFinder`."""
    num_unread: int
    """Examples that say something which the chat template does not mention."""
    unread: tuple[str, ...]
    """Names of such things."""
    omitted: Counter[str]
    """How often the chat template leaves out what is joined here by commas; see `left_out`."""
    doubled: Counter[str]
    """How often special tokens at the ends of an example, joined by commas, come twice."""
    num_misfits: int
    """Examples with nothing to tell where a prompt of plain text ends, or whose answer the chat template asks for
    otherwise than it writes it."""
    num_openings: int
    """Rows whose first message is an assistant's."""
    num_refused: int
    """Examples without tokens, since the chat template refuses them."""
    first_refusal: str


def count(rows: Dataset, *, shown: bool = False) -> Counts:
    """Count, in one pass and with a few rows in memory, what a table of tokens holds."""
    with phase("Counting tokens", "examples", total=len(rows), shown=shown) as progress:
        return _count(rows, progress)


def _count(rows: Dataset, progress: Phase) -> Counts:
    lengths: dict[str, list[Numbers]] = {"num_tokens": [], "num_targets": [], "num_left": []}
    occurring: dict[str, Counter[Any]] = {name: Counter() for name in ("unread", "end", "omitted", "doubled")}
    there: list[npt.NDArray[np.bool_]] = []
    largest = num_misfits = num_openings = 0
    first_refusal = ""
    last_opening = -1  # a conversation may lie across two batches
    for batch in batches_of(rows, [*lengths, *occurring, "input_ids", "misfit", "opens", "refusal", ROW]):
        progress.done += len(batch)
        is_there = pc.equal(batch["refusal"], "")
        there.append(is_there.to_numpy())
        if not there[-1].all():
            refusals = batch["refusal"].filter(pc.invert(is_there))
            first_refusal = first_refusal or refusals[0].as_py()
            batch = batch.filter(is_there)
        for name, found in lengths.items():
            found.append(batch[name].to_numpy().astype(np.int32))
        largest = max(largest, pc.max(pc.list_flatten(batch["input_ids"])).as_py() or 0)
        for name, so_far in occurring.items():
            so_far.update(_occurring(batch[name]))
        num_misfits += pc.sum(batch["misfit"]).as_py() or 0
        openings = np.unique(batch[ROW].filter(batch["opens"]).to_numpy())
        num_openings += int((openings > last_opening).sum())
        last_opening = int(openings[-1]) if len(openings) else last_opening
    for so_far in occurring.values():
        del so_far[""], so_far[None]
    unread = occurring["unread"]
    joined = {name: np.concatenate([np.zeros(0, np.int32), *found]) for name, found in lengths.items()}
    all_there = np.concatenate([np.zeros(0, np.bool_), *there])
    return Counts(
        **joined,
        indices=np.flatnonzero(all_there),
        num_refused=int((~all_there).sum()),
        first_refusal=first_refusal,
        largest_token=largest,
        ends=occurring["end"],
        omitted=occurring["omitted"],
        doubled=occurring["doubled"],
        num_unread=unread.total(),
        unread=tuple(sorted(_names(unread))),
        num_misfits=num_misfits,
        num_openings=num_openings,
    )


def counts_of_batch(encoded: Mapping[str, Sequence[Any]], is_first: Sequence[bool]) -> Counts:
    """Count a batch of examples as an encoder returns it, in which some are the first of their rows."""
    indices = [place for place, refusal in enumerate(encoded["refusal"]) if not refusal]
    names = Counter(encoded["unread"][place] for place in indices)
    del names[""]
    arrays = {
        name: np.array([encoded[name][place] for place in indices], np.int32)
        for name in ("num_tokens", "num_targets", "num_left")
    }
    return Counts(
        **arrays,
        indices=np.array(indices, np.int64),
        largest_token=max((max(encoded["input_ids"][place], default=0) for place in indices), default=0),
        omitted=Counter(found for place in indices if (found := encoded["omitted"][place])),
        doubled=Counter(found for place in indices if (found := encoded["doubled"][place])),
        ends=Counter(end for place in indices if (end := encoded["end"][place]) is not None),
        num_unread=names.total(),
        unread=tuple(sorted(_names(names))),
        num_misfits=sum(encoded["misfit"]),
        num_openings=sum(encoded["opens"][place] and is_first[place] for place in indices),
        num_refused=len(encoded["refusal"]) - len(indices),
        first_refusal=next(filter(None, encoded["refusal"]), ""),
    )


def longest_of(lengths: Numbers | Sequence[int]) -> str:
    """Return the `--max_length` that sequences of these lengths take, in words: that of 99 % of them, and of all."""
    most, longest = int(np.quantile(lengths, 0.99, method="higher")), int(np.max(lengths))
    return f"to {longest:,}" if most == longest else f"to {most:,} for 99 % of the examples or to {longest:,} for all"


def counted(joined: Counter[str]) -> Counter[str]:
    """Return how often each name comes, of counts of names that are joined by commas."""
    found: Counter[str] = Counter()
    for names, num in joined.items():
        found.update(dict.fromkeys(names.split(", "), num))
    return found


def count_tokens(rows: Dataset) -> Counter[int]:
    """Count how often each token occurs in a table of tokens."""
    counts: Counter[int] = Counter()
    for batch in batches_of(rows, ["input_ids"]):
        counts.update(_occurring(pc.list_flatten(batch["input_ids"])))
    return counts


def _names(joined: Iterable[str]) -> set[str]:
    return {name for several in joined for name in several.split(", ")}


def _occurring(column: pyarrow.ChunkedArray) -> dict[Any, int]:
    return {value["values"]: value["counts"] for value in pc.value_counts(column).to_pylist()}
