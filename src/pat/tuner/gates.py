"""Find what an adapter has hung into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pat.method.gate import Gate
from pat.surgery.residual import ResidualStream


def held(model: nn.Module, attribute: str, paths: Iterable[str], adapter_name: str) -> dict[str, Any]:
    """Return what the layers of that name hold for an adapter, by the path beside which they stand."""
    holders = {path: model.get_submodule(path.rpartition(".")[0]) for path in paths}
    layers = {path: getattr(holder, attribute, None) for path, holder in holders.items()}
    found = {path: layer.modules_of_adapters() for path, layer in layers.items() if layer is not None}
    return {path: modules[adapter_name] for path, modules in found.items() if adapter_name in modules}


def by_axis(
    stream: ResidualStream, mask: Gate, gates: Mapping[str, Gate], over_layers: Gate | None
) -> dict[str, list[Gate]]:
    """Return the gates of an adapter by the axis that they cut; the mask is there whether or not it cuts.

    Args:
        stream: roles of the model's parameters.
        mask: over the residual stream.
        gates: of branches, by their `gate_site`.
        over_layers: over the layers, if there is one.
    """
    found = {"hidden": [mask]}
    for branch in stream.branches:
        if branch.axis is not None and branch.gate_site in gates:
            found.setdefault(branch.axis, []).append(gates[branch.gate_site])
    return found | ({} if over_layers is None else {"layers": [over_layers]})
