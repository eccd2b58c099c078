"""Models whose weights stay on disk and are read when they are needed, one module at a time.

A hollow parameter has the shape, dtype and device of the real one but takes no memory: one NaN, seen through a view of
that shape. Everything that looks at a model's structure, peft above all, takes it for the real one, and a matrix that
somebody forgot to read cannot pass for weights.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pat.checkpoint.layout import Piece, UnknownLayoutError, stored_layout
from pat.loading import incomplete_weights
from pat.loading.stored import StoredTensor, unreadable
from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.residual import model_tensors
from pat.tuner.weights import factored_parameter

Places = list[tuple[nn.Module, str]]
"""Modules that hold a parameter, each with the name under which it does."""


def hollow_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a model in eval mode with hollow parameters and real buffers."""
    with init_empty_weights(include_buffers=False):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype))
    model.tie_weights()  # the context has taken tied parameters apart
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    _swap(model, lambda parameter: _hollow(parameter, dtype, device))
    return cast(PreTrainedModel, model.eval())


class StoredWeights:
    """The tensors of a hollow model and where they lie in a checkpoint. Vectors and buffers are read at once, and stay.

    Args:
        model: a hollow model without adapters, which may be put on it afterwards.
        stored: the tensors of a checkpoint that its parameters are stored in.
        name: of the checkpoint, for messages.

    Raises:
        PatError: the checkpoint has a parameter in another shape.
        UnknownLayoutError: the checkpoint stores something that cannot be read piece by piece, or lacks a parameter
            under the names known here.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, StoredTensor], name: str) -> None:
        self.model, self.stored, self.name = model, stored, name
        self.dtype, self.device = model.dtype, model.device
        tensors = model_tensors(model)
        owners = {id(tensor): name for name, tensor in tensors.items()}
        everywhere = tensors | dict(model.named_parameters(remove_duplicate=False))
        self._canonical = {name: owners[id(tensor)] for name, tensor in everywhere.items()}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._pieces = self._find(stored_layout(model))
        for name, tensor in tensors.items():
            is_buffer = not isinstance(tensor, nn.Parameter)
            if is_buffer or tensor.dim() < 2:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, self.read(name) if is_buffer else _frozen(self.read(name)))
        self._at_rest = dict(model.named_parameters())

    @property
    def left_over(self) -> set[str]:
        """Names of stored tensors that no parameter is read from."""
        return set(self.stored) - {piece.name for pieces in self._pieces.values() for piece in pieces}

    @property
    def shard_bytes(self) -> int | None:
        """Size in bytes of the tensors in the largest file, None if there is but one file."""
        sizes: dict[Any, int] = defaultdict(int)
        for tensor in self.stored.values():
            sizes[tensor.file] += tensor.numel * (tensor.dtype or self.dtype).itemsize
        return max(sizes.values()) if len(sizes) > 1 else None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter rounded to the model's dtype, as loading rounds it, in that or a finer dtype.

        One that needs no conversion is not copied but mapped from its file, which is opened anew each time: the pages
        of an open file count as this process's own memory for as long as the kernel likes.

        Raises:
            PatError: its file cannot be read.
        """
        name = self._canonical[name]
        parts: list[Tensor] = []
        for piece, opened in self._opened(name):
            try:
                parts.append(opened.get_tensor(piece.name).to(self.device, self.dtype))
            except (OSError, SafetensorError) as error:
                raise unreadable(self.name, self.stored[piece.name].file, error) from error
        whole = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        return whole.view(self.shapes[name]).to(dtype or self.dtype)

    def factored(self, name: str, adapter: str) -> Tensor | AdaptedMatrix:
        """Return a parameter as the adapted model uses it, a plain LoRA not multiplied out."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return self.read(name)
        canonical = self._canonical[name]
        with self._filled({canonical: self._places[canonical]}, self.dtype):
            return factored_parameter(self.model, name, adapter)

    @contextmanager
    def running(self, dtype: torch.dtype) -> Iterator[None]:
        """Have each module's parameters there while the module runs, in a dtype to compute in."""
        around: dict[nn.Module, nn.Module] = {}
        for adapter in self.model.modules():  # outer ones come before inner ones
            if isinstance(adapter, BaseTunerLayer | AuxiliaryTrainingWrapper):
                for module in adapter.modules():
                    around.setdefault(module, adapter)
        # An adapter may look at the weights of the layer that it wraps outside of that layer's own forward (DoRA).
        needs: dict[nn.Module, dict[str, Places]] = defaultdict(lambda: defaultdict(list))
        for name, places in self._places.items():
            for owner, leaf in places:
                needs[around.get(owner, owner)][name].append((owner, leaf))
        with ExitStack() as handles:
            for module, parameters in needs.items():
                visit = ExitStack()

                def enter(_module: nn.Module, _args: Any, visit: Any = visit, needed: Any = parameters) -> None:
                    visit.enter_context(self._filled(needed, dtype))

                def leave(_module: nn.Module, _args: Any, _output: Any, visit: Any = visit) -> None:
                    visit.close()

                # First of all, since the gates of experts act on a parameter.
                handles.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                handles.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    @contextmanager
    def as_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Let the hollow parameters seem to be of another dtype; after an error the model is not to be used."""
        self._swap_hollows(dtype)
        yield
        self._swap_hollows(self.dtype)

    def _opened(self, name: str) -> Iterator[tuple[Piece, Any]]:
        """Yield the pieces of a parameter in order, each with the open file that it lies in."""
        with ExitStack() as stack:
            files: dict[Any, Any] = {}
            for piece in self._pieces[name]:
                path = self.stored[piece.name].file
                if path not in files:
                    try:
                        files[path] = stack.enter_context(safe_open(path, "pt"))
                    except (OSError, SafetensorError) as error:
                        raise unreadable(self.name, path, error) from error
                yield piece, files[path]

    @contextmanager
    def _filled(self, parameters: Mapping[str, Places], dtype: torch.dtype) -> Iterator[None]:
        try:
            for name, places in parameters.items():
                resting = self._at_rest[name]
                real = _frozen(resting.to(dtype) if resting.dim() < 2 else self.read(name, dtype))
                for owner, leaf in places:
                    setattr(owner, leaf, real)
            yield
        finally:
            for name, places in parameters.items():
                for owner, leaf in places:
                    setattr(owner, leaf, self._at_rest[name])

    @cached_property
    def _places(self) -> dict[str, Places]:
        """The places of the parameters once adapters are on the model, which wrap modules and keep their parameters."""
        names = {id(parameter): name for name, parameter in self._at_rest.items()}
        places: dict[str, Places] = defaultdict(list)
        for module in self.model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in names:
                    places[names[id(parameter)]].append((module, leaf))
        return places

    def _swap_hollows(self, dtype: torch.dtype) -> None:
        hollows = {id(p): name for name, p in self._at_rest.items() if p.dim() > 1}
        replaced = _swap(self.model, lambda p: _hollow(p, dtype, self.device) if id(p) in hollows else p)
        self._at_rest |= {name: replaced[key] for key, name in hollows.items()}

    def _find(self, layout: Mapping[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
        """Return where each parameter really is: what stock transformers accepts is accepted here."""
        stored, prefix = self.stored, f"{self.model.base_model_prefix}."
        aliases: dict[str, list[str]] = defaultdict(list)
        for alias, name in self._canonical.items():
            aliases[name].append(alias)
        found: dict[str, tuple[Piece, ...]] = {}
        for name, pieces in layout.items():
            whole = [(Piece(alias, tuple(self.shapes[name]), 0),) for alias in aliases[name]]
            ways = [way for way in (pieces, *whole) if all(piece.name in stored for piece in way)]
            if len({way[0].name for way in ways}) > 1:
                raise UnknownLayoutError(f"{name} is stored more than once")
            if not ways:
                bare = tuple(Piece(p.name.removeprefix(prefix), p.shape, p.start) for p in pieces)
                ways = [bare] if all(piece.name in stored for piece in bare) else []
            if not ways:  # under a name that transformers may know, and will judge
                raise UnknownLayoutError(f"{name} is not stored under its own name")
            if any(stored[piece.name].dtype is None for piece in ways[0]):
                raise UnknownLayoutError(f"{name} is stored in a format of its own")
            if any(stored[piece.name].shape != piece.shape for piece in ways[0]):
                raise incomplete_weights(self.name, [name])
            found[name] = ways[0]
        return found


def _hollow(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return _frozen(torch.full((), float("nan"), dtype=dtype, device=device).expand(parameter.shape))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _swap(model: nn.Module, replace: Callable[[nn.Parameter], nn.Parameter]) -> dict[int, nn.Parameter]:
    """Put another parameter in each one's place, everywhere; return the new ones by the identity of the old."""
    replaced: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # an identity is one only as long as its object lives
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in replaced:
                kept.append(parameter)
                replaced[id(parameter)] = replace(parameter)
            if replaced[id(parameter)] is not parameter:
                setattr(module, name, replaced[id(parameter)])
    return replaced
