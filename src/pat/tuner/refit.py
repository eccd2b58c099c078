"""The refit: writers make up for what is cut before them, by least squares on the base model's own activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from pat.method.inner import InnerGate
from pat.surgery.compensate import reconstruction
from pat.tuner.calibration import share_from_first_process, watch_inputs

TOKENS_PER_CHANNEL = 16
"""Tokens to fit on, as a multiple of the number of channels before a writer."""

MAX_BYTES = 2 * 2**30
"""Memory for second moments, `(size, size)` in float32 for each layer: a large model takes several passes."""


def refit(
    model: nn.Module, gates: Mapping[str, InnerGate], batches: Iterable[Mapping[str, Any]], num_tokens: int | None
) -> int:
    """Fit the reconstruction of every hard gate that awaits it, and return the number of tokens it stands on.

    Args:
        model: the base model, its adapters disabled.
        gates: by the path of the writer.
        batches: see `watch_inputs`.
        num_tokens: how many tokens to read; by default `TOKENS_PER_CHANNEL` times the number of channels.

    Raises:
        PatError: the batches hold no token.
    """
    waiting = {path: gate for path, gate in gates.items() if gate.awaits_refit}
    if not waiting:
        return 0
    size = max(gate.size for gate in waiting.values())
    enough = num_tokens or TOKENS_PER_CHANNEL * size
    seen, paths = 0, iter(waiting)
    read: list[Mapping[str, Any]] = []
    source: Iterable[Mapping[str, Any]] = _keeping(batches, read)
    while group := list(islice(paths, max(1, MAX_BYTES // (4 * size**2)))):
        moments: dict[str, Tensor] = {}
        shown = tqdm(source, desc="Refitting", unit="batch", leave=False, disable=None)
        seen = watch_inputs(model, {path: partial(_add, moments, path) for path in group}, shown, enough)
        for path in group:
            waiting[path].set_reconstruction(reconstruction(moments.pop(path), waiting[path].keep))
            share_from_first_process(waiting[path].reconstruction)
        source = read
    return seen


def _add(moments: dict[str, Tensor], path: str, rows: Tensor) -> None:
    moment = rows.mT @ rows
    moments[path] = moments[path].add_(moment) if path in moments else moment


def _keeping(batches: Iterable[Mapping[str, Any]], kept: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for batch in batches:
        kept.append(batch)
        yield batch
