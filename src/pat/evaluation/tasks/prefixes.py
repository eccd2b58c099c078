"""Which sequences of tokens share how much of their beginnings: what a batched evaluation computes only once.

The plan has three levels. The *root* begins every sequence (the instruction of a task). A *family* is a set of
sequences that share more (the choices of a question, the questions on a passage). What is left is a sequence's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

MAX_FAMILY = 256
"""Largest family; bounds the search."""

FAMILY_COST = 8
"""Tokens that sharing must save before it is worth a forward pass of its own."""

MOST_PADDING = 0.15
"""Largest share of a row that is padding: beyond it, a smaller batch computes fewer tokens."""

LEAST_PADDING = 4
"""Tokens of padding that a row may always have: the smallest batches are not worth a forward pass each."""


@dataclass(frozen=True)
class Item:
    """One sequence to compute."""

    tokens: tuple[int, ...]
    num_scored: int
    """So many of the last positions are read off, at least one; they are never part of a shared beginning."""

    @property
    def room(self) -> int:
        """How many tokens at the beginning may be shared."""
        return len(self.tokens) - self.num_scored


@dataclass(frozen=True)
class Family:
    """Sequences, by index, that share their first `length` tokens, those of the root included."""

    members: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Plan:
    """What is shared: every sequence is in one family, alone (then the root is all it shares) or with others."""

    root: int
    families: tuple[Family, ...]

    def num_tokens(self, items: Sequence[Item]) -> int:
        """Count the tokens that the plan computes, padding left out."""
        total = self.root
        for family in self.families:
            total += family.length - self.root
            total += sum(len(items[index].tokens) - family.length for index in family.members)
        return total


def plan_prefixes(items: Sequence[Item]) -> Plan:
    """Find the root and the families that leave the fewest tokens to compute."""
    if not items:
        return Plan(root=0, families=())
    order = sorted(range(len(items)), key=lambda index: items[index].tokens)
    # In lexicographic order, what a stretch of sequences shares is what its neighbours share.
    shared = [_common(items[a].tokens, items[b].tokens) for a, b in pairwise(order)]
    root = min([items[index].room for index in order] + shared) if len(items) > 1 else 0
    root = root if root > FAMILY_COST else 0

    # best[end]: the fewest tokens for the first `end` sequences, and where their last family begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        last = items[order[end - 1]]
        own = len(last.tokens) - root
        choice = (best[end - 1][0] + own, end - 1)
        common, total = last.room, own
        for start in range(end - 2, max(-1, end - 1 - MAX_FAMILY), -1):
            first = items[order[start]]
            common = min(common, shared[start], first.room)
            if common <= root:
                break
            total += len(first.tokens) - root
            saved = (end - 1 - start) * (common - root)
            cost = best[start][0] + total - saved + FAMILY_COST
            if cost < choice[0]:
                choice = (cost, start)
        best.append(choice)

    families = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        members = order[start:end]
        length = root
        if len(members) > 1:
            length = min([items[index].room for index in members] + shared[start : end - 1])
        families.append(Family(tuple(members), length))
        end = start
    return Plan(root, tuple(families))


def similar_batches(things: Sequence[T], length: Callable[[T], int], batch_size: int) -> Iterator[list[T]]:
    """Cut things into batches, the longest first, none much longer than another of its batch."""
    batch: list[T] = []
    for thing in sorted(things, key=length, reverse=True):
        if batch:
            longest = length(batch[0])
            padding = longest - length(thing)
            if len(batch) == batch_size or padding > max(LEAST_PADDING, MOST_PADDING * longest):
                yield batch
                batch = []
        batch.append(thing)
    if batch:
        yield batch


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    return next((index for index in range(length) if a[index] != b[index]), length)
