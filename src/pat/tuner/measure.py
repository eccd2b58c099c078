"""Calibration of one adapter: everything that is chosen by looking at the base model on text."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pat.method.basis import UnifiedMask
from pat.method.gate import Gate
from pat.surgery.residual import ResidualStream
from pat.surgery.rotation import ChannelOrder
from pat.tuner.calibration import choose_channels
from pat.tuner.config import PatConfig
from pat.tuner.depth import order_layers
from pat.tuner.refit import InnerMoments, order_channels


def choose(
    model: nn.Module,
    stream: ResidualStream,
    config: PatConfig,
    mask: UnifiedMask | None,
    over_layers: Gate | None,
    moments: InnerMoments,
    effective: Callable[[str], Tensor],
) -> ChannelOrder | None:
    """Give an adapter's gates their priors, and its mask a basis; return the order of the stream's channels.

    Args:
        model: the base model, its adapters disabled.
        stream: roles of its parameters.
        config: of the adapter.
        mask: of the adapter; None leaves it as it is.
        over_layers: gate over the layers, if they are cut.
        moments: of what goes into the writers behind the other gates, and the text.
        effective: returns a base parameter by name, with LoRA merged in.

    Raises:
        PatError, RunFailed: see `choose_channels`.
    """
    order = None
    if over_layers is not None:
        order_layers(model, stream, over_layers, moments.text())
    if mask is not None:
        order = choose_channels(model, stream, config, mask, effective, moments.text())
        mask.set_prior(order.prior, pinned=order.pinned, basis=order.basis, head_factor=order.head_factor)
    writers = {branch.gate_site: branch.writer.weight for branch in stream.branches}
    order_channels(moments, lambda site: effective(writers[site]))  # last: it lets go of the text
    return order
