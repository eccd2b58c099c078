"""Choose the MLP channels and heads that are cut, and fit what makes up for them, on activations of the base model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pat.errors import Diverged
from pat.method.inner import ExpertsGate, InnerGate
from pat.report.progress import phase
from pat.surgery.compensate import elimination, reconstruction, shrink
from pat.surgery.precision import to_float64, without_autocast
from pat.surgery.rotation import importance_order
from pat.tuner.calibration import NOT_FINITE, more_text, watch_inputs
from pat.tuner.experts import ExpertsWatch, tokens_per_routed
from pat.tuner.shared import share_from_first_process, sum_over_processes, total_over_processes

logger = logging.getLogger(__name__)

TOKENS_PER_CHANNEL = 16
"""Tokens to measure, as a multiple of the number of channels before a writer; of each expert, on average."""

MAX_BYTES = 2 * 2**30
"""Memory for second moments, `(size, size)` in float32 for each layer: a large model takes several passes."""


class InnerMoments:
    """Second moments of what goes into the writers of gated branches, on a text that can be gone through again.

    Args:
        model: the base model, its adapters disabled while it is measured.
        gates: before the writers, by the `gate_site` of their branches.
        batches: see `watch_inputs`; read once, whether or not they can be read again.
        num_tokens: how many tokens to read; by default `TOKENS_PER_CHANNEL` times the number of channels, and as many
            times more as an expert sees fewer of them.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Mapping[str, InnerGate],
        batches: Iterable[Mapping[str, Any]],
        num_tokens: int | None,
    ) -> None:
        self.model, self.gates = model, gates
        routed = tokens_per_routed(getattr(model, "config", None))
        self.size = max((gate.num_channels for gate in gates.values()), default=1)
        self.fewest = max(
            (gate.num_channels * (routed if _has_experts(gate) else 1) for gate in gates.values()), default=1
        )
        """Number of tokens of which each writer sees as many as it has channels, an expert's on average."""
        self.enough = num_tokens or TOKENS_PER_CHANNEL * self.fewest
        self.num_tokens = 0
        self.num_scarce = 0
        """Number of experts that saw fewer tokens than they have channels."""
        self._unread, self._read = iter(batches), list[Mapping[str, Any]]()
        self.known: dict[str, Tensor] = {}
        """All moments, once they have been measured and if they fit into memory together."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the path of each writer and its moment; as few passes over the text as `MAX_BYTES` allows."""
        if self.known:
            yield from self.known.items()
            return
        largest = max((gate.num_channels**2 * len(_stacked(gate.keep, 1)) for gate in self.gates.values()), default=1)
        num_at_once, paths = max(1, MAX_BYTES // (4 * largest)), iter(self.gates)
        self.num_scarce = 0
        while group := list(islice(paths, num_at_once)):
            moments: dict[str, Tensor] = {}
            experts = {p: ExpertsWatch(self.model.get_submodule(p)) for p in group if _has_experts(self.gates[p])}
            watchers = {path: experts.get(path) or partial(_add, moments, path) for path in group}
            self.num_tokens = watch_inputs(
                self.model, watchers, self.text(), self.enough, "Reading text, to choose what is cut"
            )
            sum_over_processes(*(moment for path, moment in moments.items() if path not in experts))
            for path, watch in experts.items():
                moments[path] = watch.moments
                sum_over_processes(*watch.moments)
                for moment, num_tokens in zip(watch.moments, watch.num_tokens, strict=True):
                    num_tokens = total_over_processes(int(num_tokens), self.model)
                    self.num_scarce += num_tokens < len(moment)
                    shrink(moment, num_tokens)
            if not all(moment.isfinite().all() for moment in moments.values()):
                raise Diverged(NOT_FINITE)
            if len(group) == len(self.gates):
                self.known, self._read, self._unread = moments, [], iter(())
            for path in group:
                yield path, moments[path] if self.known else moments.pop(path)

    def remedy(self) -> str:
        """Return the advice for a calibration on too few tokens, see `more_text`."""
        return more_text(self.num_tokens, self.enough, "refit_tokens", TOKENS_PER_CHANNEL * self.fewest)

    def text(self) -> Iterator[Mapping[str, Any]]:
        """Yield the batches from the first one on, whatever has been read of them."""
        yield from self._read
        for batch in self._unread:
            self._read.append(batch)
            yield batch


def order_channels(moments: InnerMoments, writer: Callable[[str], Tensor]) -> None:
    """Give the gates their prior: which channels, or groups of heads, the output of the writer can do without.

    With a refit to come, an entry counts by what the others cannot make up for (`elimination`); without one, by the
    energy of its channels times the squared norms of their columns.

    Args:
        moments: of the gates.
        writer: returns the writer's weight by the `gate_site` of its branch, with LoRA merged in.
    """
    if not moments.gates:
        return
    with phase("Ordering channels", "branches", total=len(moments.gates)) as progress:
        for path, moment in progress.over(moments):
            gate = moments.gates[path]
            with without_autocast(moment):
                priors = [_prior(gate, *each) for each in zip(_stacked(moment), _stacked(writer(path)), strict=True)]
            prior = torch.stack(priors).view_as(gate.prior)
            share_from_first_process(prior)
            gate.set_prior(prior)
    if moments.num_scarce:
        logger.warning(
            "%d experts saw fewer calibration tokens than they have channels; their order and refit lean on the "
            "weights instead, or on them alone. All together saw %d tokens; %s.",
            moments.num_scarce,
            moments.num_tokens,
            moments.remedy(),
        )
    if moments.num_tokens < moments.size:
        logger.warning(
            "The order of %d channels before a writer and their refit stand on %d calibration tokens, which are fewer; "
            "%s.",
            moments.size,
            moments.num_tokens,
            moments.remedy(),
        )


def refit(gates: Mapping[str, InnerGate], moments: Iterable[tuple[str, Tensor]]) -> None:
    """Fit the reconstruction of hard gates, given the second moments of what goes into them (and maybe into others)."""
    with phase("Fitting what stays", "branches", total=len(gates)) as progress:
        for path, moment in moments:
            if (gate := gates.get(path)) is not None:
                assert gate.reconstruction is not None, "it awaits a refit"
                with without_autocast(moment):
                    fits = [
                        reconstruction(*each)
                        for each in zip(_stacked(moment), _stacked(gate.kept_channels, 1), strict=True)
                    ]
                gate.set_reconstruction(torch.stack(fits).view_as(gate.reconstruction))
                share_from_first_process(gate.reconstruction)
                progress.done += 1


def _prior(gate: InnerGate, moment: Tensor, weight: Tensor) -> Tensor:
    """Return the prior `(size,)` of one writer's gate: of a stack, that of one expert."""
    moment = to_float64(moment)
    weight = to_float64(weight).to(moment.device)
    if gate.reconstruction is not None:
        score = elimination(moment, weight, gate.num_kept, gate.width)
    else:
        score = (moment.diagonal() * weight.square().sum(0)).unflatten(0, (-1, gate.width)).sum(1)
    return importance_order(score, gate.num_kept).prior


def _has_experts(gate: InnerGate) -> bool:
    return isinstance(gate, ExpertsGate)


def _stacked(tensor: Tensor, num_axes: int = 2) -> Tensor:
    """Return tensors of some axes as a stack of them, which one alone is as well."""
    return tensor.reshape(-1, *tensor.shape[-num_axes:])


def _add(moments: dict[str, Tensor], path: str, rows: Tensor) -> None:
    moment = rows.mT @ rows
    moments[path] = moments[path].add_(moment) if path in moments else moment
