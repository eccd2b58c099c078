"""Layers PAT hangs into a model: shared mask and layer gate, operators and gates beside writers, acting by hooks.

Hooks leave the writers themselves to LoRA (or to nothing: operators sit on every writer whatever LoRA targets), cover
embeddings, MoE blocks and `modules_to_save` alike, and keep every parameter name of the base model as it is.
All layers are `BaseTunerLayer`s, so that peft itself switches, freezes, deletes and saves their adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pat.method.basis import UnifiedMask
from pat.method.gate import Gate
from pat.method.inner import InnerGate
from pat.method.operator import Operator

MASK_NAME = "pat_mask"
OPERATOR_NAME = "pat_hsm"
GATE_NAME = "pat_gate"
DEPTH_NAME = "pat_depth"
"""Attribute names of the layers on the module that holds the embedding (mask, depth), respectively the writer."""

NAMES = (MASK_NAME, OPERATOR_NAME, GATE_NAME, DEPTH_NAME)


class PruningLayer(nn.Module, BaseTunerLayer):
    """Layer that acts by hooks. It wraps no module, so there is no base layer to merge into, follow or look through."""

    def __init__(self) -> None:
        super().__init__()
        self._devices: dict[str, torch.device] = {}
        self._handles: list[RemovableHandle] = []

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def weight(self) -> Tensor:
        """Raise, as such a layer has no weight; peft would look for one in a base layer without end."""
        raise AttributeError(f"{type(self).__name__} has no weight")

    @property
    def bias(self) -> Tensor:
        """Raise, as such a layer has no bias; see `weight`."""
        raise AttributeError(f"{type(self).__name__} has no bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: `PatModel` folds operators and mask, since merging layer by layer cannot change shapes."""

    def unmerge(self) -> None:
        """Do nothing, see `merge`."""

    def add_adapter(self, adapter_name: str, module: nn.Module, device: torch.device) -> None:
        """Add the module of a new adapter."""
        self.modules_of_adapters()[adapter_name] = module
        self._devices[adapter_name] = device
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put an adapter beside what it acts on, in float32 as it is; peft asks for it after loading as well.

        With `low_cpu_mem_usage` peft makes parameters on the meta device, and gives them values on loading.
        """
        if adapter_name in self.modules_of_adapters():
            place = device or self._devices[adapter_name]
            module = self.modules_of_adapters()[adapter_name]
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(place))

    def modules_of_adapters(self) -> nn.ModuleDict:
        """Return the modules that the layer holds, by the name of the adapter."""
        return cast(nn.ModuleDict, getattr(self, self.adapter_layer_names[0]))


class MaskLayer(PruningLayer):
    """Layer that holds the unified mask of every adapter."""

    adapter_layer_names = ("masks",)

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.ModuleDict()

    def mask(self, adapter_name: str) -> UnifiedMask:
        """Return the mask of an adapter."""
        return cast(UnifiedMask, self.masks[adapter_name])


class GateLayer(PruningLayer):
    """The gates of all adapters before one writer, over the space inside its branch."""

    adapter_layer_names = ("gates",)

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleDict()

    def gate(self, adapter_name: str) -> InnerGate:
        """Return the gate of an adapter."""
        return cast(InnerGate, self.gates[adapter_name])

    def attach(self, writer: nn.Module) -> None:
        """Hook the input of `writer`."""
        self.detach()
        self._handles.append(writer.register_forward_pre_hook(self._read))

    def _read(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inner = args[0]
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.gates:
                inner = self.gate(name)(inner)
        return (inner, *args[1:])


class DepthLayer(PruningLayer):
    """The gates of all adapters over the model's layers: each entry scales what both branches of its layer add."""

    adapter_layer_names = ("gates",)

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleDict()

    def attach(self, ends: Sequence[Sequence[nn.Module]]) -> None:
        """Hook the outputs of the modules that end the branches of each layer."""
        self.detach()
        for number, modules in enumerate(ends):
            for module in modules:
                # A partial of a bound method, not a closure: a deep copy of the model then calls the copied layer.
                self._handles.append(module.register_forward_hook(partial(self._scale, number)))

    def _scale(self, number: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.gates:
                value = cast(Gate, self.gates[name]).values()[number]
                output = (output * value.to(output.device)).to(output.dtype)
        return output


class HsmLayer(PruningLayer):
    """Hybrid sparsification modules behind one writer: z = m * (D y) for the active adapter (paper, eq. 4).

    Args:
        mask_layer: the layer that holds the shared masks. It is registered once, elsewhere: here it is kept out of the
            module tree, so that it is neither saved nor moved once per writer.
    """

    adapter_layer_names = ("operators",)

    def __init__(self, mask_layer: MaskLayer) -> None:
        super().__init__()
        self.operators = nn.ModuleDict()
        self.tied_adapters: set[str] = set()
        """Adapters whose operator also acts before the head that shares this embedding's matrix."""
        self._mask_layer = [mask_layer]

    def operator(self, adapter_name: str) -> Operator:
        """Return the operator D of an adapter."""
        return cast(Operator, self.operators[adapter_name])

    def set_tied(self, adapter_name: str, *, tied: bool) -> None:
        """Note whether an adapter's operator also acts before the head; to be followed by `attach`."""
        if tied:
            self.tied_adapters.add(adapter_name)
        else:
            self.tied_adapters.discard(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter: a later one of the same name may be untied."""
        super().delete_adapter(adapter_name)
        self.tied_adapters.discard(adapter_name)

    def attach(self, site: nn.Module, final_norm: nn.Module | None) -> None:
        """Hook the output of `site`, and of the final norm if an operator also acts before a tied head."""
        self.detach()
        # Bound methods, not closures: a deep copy of the model then calls the copied layer.
        self._handles.append(site.register_forward_hook(self._write))
        if final_norm is not None and self.tied_adapters:
            self._handles.append(final_norm.register_forward_hook(self._read_tied))

    def _active(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.operators]

    def _write(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        for name in self._active():
            operator, mask = self.operator(name), self._mask_layer[0].mask(name)
            if mask.basis is None:
                output = operator.gated(output, mask.values())
            else:
                output = mask(output + operator.change(output).to(output.dtype))
        return output

    def _read_tied(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Apply D0ᵀ to the final normed state, after the equalised gain's factor (that order is the merged model's).

        On the norm's output, never around the head: fused heads read `lm_head.weight` and would skip a wrapper.
        """
        for name in self._active():
            if name not in self.tied_adapters:
                continue
            factor = self._mask_layer[0].mask(name).head_factor
            if factor is not None:
                output = (output * factor.to(output.device)).to(output.dtype)
            output = output + self.operator(name).change_transposed(output).to(output.dtype)
        return output
