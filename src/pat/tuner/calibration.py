"""Calibration: measure the residual stream on text, and choose a rotation and an order of the channels from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pat import ranks
from pat.errors import Diverged, PatError
from pat.method.basis import UnifiedMask
from pat.nll import evaluating
from pat.report.progress import phase
from pat.surgery.precision import to_float64, without_autocast
from pat.surgery.residual import ResidualStream
from pat.surgery.rotation import ChannelOrder, equalising_factor, gain_block, importance_order, pca_order
from pat.tuner.config import PatConfig
from pat.tuner.shared import own_rows, share_from_first_process, sum_over_processes, total_over_processes

logger = logging.getLogger(__name__)

DEFAULT_TOKENS_PER_CHANNEL = 4
"""Calibration tokens per hidden channel. The second moment of d channels from n tokens settles at a few n/d; each token
counts at every branch. SmolLM2-135M cut to 432 of 576 channels, before any tuning, two samples each: 4.85 and 4.77 nats
with 1 token a channel, 4.66 and 4.71 with 2, 4.57 and 4.63 with 4."""


NOT_FINITE = (
    "The base model's activations on the calibration data became non-finite; expected finite numbers: check its "
    "weights, or load it in another dtype."
)


def choose_channels(
    model: nn.Module,
    stream: ResidualStream,
    config: PatConfig,
    mask: UnifiedMask,
    effective: Callable[[str], Tensor],
    batches: Iterable[Mapping[str, Any]],
) -> ChannelOrder:
    """Measure the stream and order its channels: by energy in the PCA basis, or by importance without a rotation.

    Args:
        model: the base model, its adapters disabled.
        stream: roles of its parameters.
        config: of the adapter.
        mask: of the adapter; it says which parts a calibration has to fill.
        effective: returns a base parameter by name, with LoRA merged in.
        batches: see `StreamStatistics.collect`; read until there are enough tokens.

    Returns:
        The order, in a distributed run of what all processes have measured, as the first one rounds it.

    Raises:
        PatError: the batches hold no token, or too few channels can be rotated.
        Diverged: the model's activations are not finite.
    """
    rotate = mask.basis is not None
    enough = DEFAULT_TOKENS_PER_CHANNEL * mask.hidden_size
    wanted = config.calibration_tokens or enough
    statistics = StreamStatistics(model, stream, full=rotate)
    statistics.collect(batches, wanted)
    if statistics.num_tokens < mask.hidden_size:
        logger.warning(
            "The %s of %d channels stands on %d calibration tokens, fewer than it has channels; %s, or use "
            "rotation='none'.",
            "rotation" if rotate else "order of importance",
            mask.hidden_size,
            statistics.num_tokens,
            more_text(statistics.num_tokens, wanted, "calibration_tokens", enough),
        )
    with without_autocast(next(model.parameters())):
        if not rotate:
            order = importance_order(statistics.importance(effective), mask.pruned_hidden_size)
        elif mask.head_factor is None:
            order = pca_order(statistics.covariance(), mask.pruned_hidden_size)
        else:
            norm = f"{stream.final_norm}.weight"
            gain = to_float64(effective(norm)) + stream.family.gain_offset
            block = gain_block(gain, config.gain_tolerance)
            order = pca_order(statistics.covariance(), mask.pruned_hidden_size, block)
            order = replace(order, head_factor=equalising_factor(gain, block))
    num_pinned = int(order.pinned.sum())
    if num_pinned >= mask.pruned_hidden_size:
        raise PatError(
            f"Got {num_pinned} of {mask.hidden_size} channels whose final gain keeps them from being rotated, and only "
            f"{mask.pruned_hidden_size} channels are to be kept; raise gain_tolerance or use rotation='none'."
        )
    share_from_first_process(order.prior, order.pinned, order.basis, order.head_factor)
    return replace(order, num_tokens=statistics.num_tokens)


def more_text(num_tokens: int, enough: int, option: str, default: int) -> str:
    """Return the advice for a calibration that has read too little: another text if it has read all, else more of it.

    Args:
        num_tokens: number of tokens that were read.
        enough: number of tokens after which no more are read.
        option: name of the option that sets it.
        default: value of the option for this model.
    """
    if num_tokens < enough:
        return "these are all that there are: give more rows, or a text file that has more (calibration=FILE)"
    return f"raise {option}, which is {enough} here and {default} by default for this model"


class StreamStatistics:
    """Second moments of the residual stream, summed over the inputs of all branches and of the final norm.

    Each token is scaled to RMS 1, as its reader's norm sees it. Without that scaling the few tokens with massive
    activations, and the last layers, would choose the basis alone.
    """

    def __init__(self, model: nn.Module, stream: ResidualStream, *, full: bool) -> None:
        self.model, self.stream, self.full = model, stream, full
        self.num_tokens = 0
        self._moments: dict[str, Tensor] = {}

    def collect(self, batches: Iterable[Mapping[str, Any]], max_tokens: int) -> None:
        """Run the model over batches (`input_ids`, optional `attention_mask`) until `max_tokens` are seen.

        Raises:
            PatError: the batches hold no token, or no `input_ids`.
            Diverged: the model's activations are not finite.
        """
        recorders = {site: partial(self.record, site) for site in self._sites()}
        self.num_tokens = watch_inputs(self.model, recorders, batches, max_tokens, "Reading text to order the channels")
        sum_over_processes(*self._moments.values())
        if not all(moment.isfinite().all() for moment in self._moments.values()):
            raise Diverged(NOT_FINITE)

    def covariance(self) -> Tensor:
        """Return the summed second moment, `(d, d)` in float64."""
        return self._moments[""] / self.num_tokens

    def importance(self, effective: Callable[[str], Tensor]) -> Tensor:
        """Return the importance of each channel, `(d,)`: its energy times what the readers behind it make of it.

        Args:
            effective: function from parameter name to tensor.
        """
        total: Tensor | None = None
        for site, readers, gain_name in self._read_sites():
            energy = self._moments[site] / self.num_tokens
            if gain_name is not None:
                gain = to_float64(effective(gain_name)) + self.stream.family.gain_offset
                energy = energy * gain.square().to(energy.device)
            weight = torch.stack([to_float64(effective(r)).square().flatten(0, -2).sum(0) for r in readers]).sum(0)
            score = energy * weight.to(energy.device)
            share = score / score.sum().clamp_min(torch.finfo(score.dtype).tiny)  # a reader may read nothing at all
            total = share if total is None else total + share.to(total.device)
        assert total is not None
        return total

    def record(self, site: str, rows: Tensor) -> None:
        """Add tokens of the stream at a site, `(tokens, d)` in float32."""
        rows = rows * rows.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        # A rotation needs one sum over all sites; d x d numbers for each would not fit beside a large model.
        key = "" if self.full else site
        moment = to_float64(rows.mT @ rows if self.full else rows.square().sum(0))
        # On the device of the first site, if the model is spread over several.
        known = self._moments.get(key)
        self._moments[key] = moment if known is None else known + moment.to(known.device)

    def _sites(self) -> list[str]:
        return [site for site, _, _ in self._read_sites()]

    def _read_sites(self) -> list[tuple[str, list[str], str | None]]:
        """List (module whose input is the stream, reader weights behind it, gain in between)."""
        stream = self.stream
        sites: list[tuple[str, list[str], str | None]] = []
        for branch in stream.branches:
            readers = [reader.weight for reader in branch.readers]
            norm = branch.pre_norm
            site = branch.readers[0].path if norm is None else norm
            sites.append((site, readers, None if norm is None else f"{norm}.weight"))
        head = f"{stream.embedding}.weight" if stream.head is None else stream.head.weight
        sites.append((stream.final_norm, [head], f"{stream.final_norm}.weight"))
        return sites


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    watchers: Mapping[str, Callable[..., None]],
    batches: Iterable[Mapping[str, Any]],
    max_tokens: int,
    title: str = "Measuring the model",
) -> int:
    """Run a model over batches and show what goes into some of its modules; return the number of tokens.

    In a distributed run each process sees a part of the rows, see `token_batches`; the number is that of all.

    Args:
        model: the model, its adapters disabled.
        watchers: functions of the inputs, by the module's path: of each tensor `(tokens, size)` that it is given, in
            float32 where it holds no whole numbers, paddings left out.
        batches: mappings with `input_ids` `(batch, length)`, and `attention_mask` or `position_ids` where there is one.
        max_tokens: number of tokens after which no further batch is read.
        title: what is shown of it while it runs.

    Raises:
        PatError: the batches hold no token, or no `input_ids`.
    """
    watch, num_tokens = _Watch(), 0
    with ExitStack() as restore:
        restore.enter_context(evaluating(model))
        progress = restore.enter_context(phase(title, "tokens", total=max_tokens // ranks.num_processes()))
        progress.is_most = True  # the text may be shorter
        for path, watcher in watchers.items():
            handle = model.get_submodule(path).register_forward_pre_hook(partial(watch, watcher))
            restore.callback(handle.remove)
        for inputs, real in token_batches(model, batches, max_tokens):
            watch.selected = real.flatten().nonzero().squeeze(1)
            num_tokens += len(watch.selected)
            model(**inputs, use_cache=False, logits_to_keep=1)
            progress.done = min(num_tokens, max_tokens // ranks.num_processes())  # the last batch may have more
    return total_over_processes(num_tokens, model)


def token_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], max_tokens: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield what a model is to read of each batch, on its device, and which of its tokens are real `(batch, length)`.

    In a distributed run every process is given the same batches, and reads its share of the rows of each.

    Args:
        model: the model.
        batches: mappings with `input_ids` `(batch, length)`, and `attention_mask` or `position_ids` where there is one.
        max_tokens: number of real tokens after which no further batch is read.

    Raises:
        PatError: the batches hold no token, or no `input_ids`.
    """
    device, num_tokens = next(model.parameters()).device, 0
    for batch in batches:
        if num_tokens >= max_tokens:
            break
        if "input_ids" not in batch:
            raise PatError(f"Got calibration batches without input_ids; they have {sorted(batch)}.")
        # Only what the batch has: with a mask, be it all ones, transformers no longer looks at the position ids to
        # tell packed rows apart.
        inputs = {
            key: torch.as_tensor(batch[key]).to(device)
            for key in ("input_ids", "attention_mask", "position_ids")
            if batch.get(key) is not None
        }
        real = real_tokens(model, inputs["input_ids"], inputs)
        num_tokens += int(real.sum())
        inputs, has_rows = own_rows(inputs | {"real": real})
        real = inputs.pop("real")
        yield inputs, real if has_rows else torch.zeros_like(real)
    if num_tokens == 0:
        raise PatError("The calibration data holds no tokens; expected batches with input_ids.")


class _Watch:
    """A forward pre-hook, but for its first argument, that hands on a module's inputs at the tokens of the batch."""

    selected: Tensor

    def __call__(self, watcher: Callable[..., None], _module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = [rows.detach().flatten(0, -2) for rows in args if isinstance(rows, Tensor)]
        with without_autocast(inputs[0]):  # the model may run under it; moments are of float32
            chosen = [rows[self.selected.to(rows.device)] for rows in inputs]
            watcher(*(rows.float() if rows.is_floating_point() else rows for rows in chosen))


def real_tokens(model: nn.Module, ids: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Tell tokens from padding, by the mask or, for packed and for bare rows, by what a row ends with."""
    mask = given.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        return mask.bool()
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if "position_ids" in given:
        filler = given["position_ids"].expand_as(ids) == 0
    else:
        filler = ids == pad if pad is not None else torch.zeros_like(ids, dtype=torch.bool)
    return ~filler.flip(-1).cumprod(-1).flip(-1).bool()
