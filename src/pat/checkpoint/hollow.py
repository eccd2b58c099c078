"""Models whose matrices stay on disk and are read when they are needed, one module at a time.

A hollow parameter has the shape, dtype and device of the real one but takes no memory: one NaN, seen through a view of
that shape. Everything that looks at a model's structure, peft above all, takes it for the real one, and a matrix that
somebody forgot to read cannot pass for weights.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pat.checkpoint.layout import Piece, UnknownLayoutError, stored_layout
from pat.checkpoint.memory import ReusedMemory
from pat.checkpoint.read import Checkpoint
from pat.loading import incomplete_weights
from pat.surgery.residual import stored_tensors

AHEAD_BYTES = 2**30
"""How far ahead of their use the system is asked to read weights from the disk, into its file cache."""

Places = list[tuple[nn.Module, str]]
"""Modules that hold a parameter, and under which name."""


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
        checkpoint: what its parameters are stored in.
        memory: what to read into; several models may share it.

    Raises:
        PatError: the checkpoint has a parameter in another shape.
        UnknownLayoutError: the checkpoint stores something that cannot be read piece by piece, or lacks a parameter
            under the names known here.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, memory: ReusedMemory | None = None) -> None:
        self.model, self.checkpoint, self.memory = model, checkpoint, memory or ReusedMemory()
        self.dtype, self.device = model.dtype, model.device
        tensors = stored_tensors(model)
        owners = {id(tensor): name for name, tensor in tensors.items()}
        everywhere = tensors | dict(model.named_parameters(remove_duplicate=False))
        self._canonical = {name: owners[id(tensor)] for name, tensor in everywhere.items()}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._asked_for: set[str] = set()
        self._pieces = self._find(stored_layout(model))
        self._next = dict(zip(self.shapes, [*list(self.shapes)[1:], None], strict=True))
        for name, tensor in tensors.items():
            is_buffer = not isinstance(tensor, nn.Parameter)
            if is_buffer or tensor.dim() < 2:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, self.read(name) if is_buffer else _frozen(self.read(name)))
        self._at_rest = dict(model.named_parameters())

    @property
    def left_over(self) -> set[str]:
        """Names of stored tensors that no parameter is read from."""
        return set(self.checkpoint.tensors) - {piece.name for pieces in self._pieces.values() for piece in pieces}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter rounded to the model's dtype, as loading rounds it, in that or a finer dtype.

        A matrix that needs no conversion is not copied, see `Checkpoint.mapped`.
        """
        name = self._canonical[name]
        target = dtype or self.dtype
        stored = [self.checkpoint.tensors[piece.name].dtype for piece in self._pieces[name]]
        rounds = any(torch.promote_types(d, self.dtype) != self.dtype for d in stored if d is not None)
        dtype, pieces = self.dtype if rounds else target, self._pieces[name]
        if len(pieces) == 1 and stored == [dtype] and self.device.type == "cpu" and len(self.shapes[name]) > 1:
            out = self.checkpoint.mapped(pieces[0].name).view(self.shapes[name])
        else:
            out = self.memory.empty(self.shapes[name], dtype, self.device)
            for piece in pieces:
                self.checkpoint.read(piece.name, out.view(-1)[piece.start : piece.start + piece.numel])
        self._prefetch(name)
        return out.to(target)

    def rows(self, name: str, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a matrix of which only some rows have been read, rounded as `read` does; the others hold anything.

        On a CPU, rows that nobody touches take no memory.
        """
        name = self._canonical[name]
        stored = self.checkpoint.mapped(self._pieces[name][0].name).view(self.shapes[name])
        self._prefetch(name)
        indices = indices.unique()
        read = stored.index_select(0, indices.cpu()).to(self.device, self.dtype).to(dtype)
        return torch.empty(self.shapes[name], dtype=dtype, device=self.device).index_copy_(0, indices, read)

    @contextmanager
    def present(self, name: str) -> Iterator[None]:
        """Have one parameter in the model, wherever adapters have put it, in the model's dtype."""
        name = self._canonical[name]
        with self._filled({name: self._places[name]}, self.dtype):
            yield

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
        with ExitStack() as stack:
            for module, parameters in needs.items():
                visit = _Visit(self, parameters, dtype)
                stack.callback(module.register_forward_pre_hook(visit.enter).remove)
                stack.callback(module.register_forward_hook(visit.leave, always_call=True).remove)
            yield

    @contextmanager
    def as_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Let the hollow parameters seem to be of another dtype."""
        self._swap_hollows(dtype)
        try:
            yield
        finally:
            self._swap_hollows(self.dtype)

    @contextmanager
    def _filled(
        self, parameters: Mapping[str, Places], dtype: torch.dtype, looked_up: Tensor | None = None
    ) -> Iterator[None]:
        try:
            for name, places in parameters.items():
                resting = self._at_rest[name]
                if looked_up is not None and len(self._pieces[name]) == 1:
                    real = _frozen(self.rows(name, looked_up, dtype))
                else:
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
        """Where the parameters are, once adapters are on the model: those wrap modules, and keep their parameters."""
        names = {id(parameter): name for name, parameter in self._at_rest.items()}
        places: dict[str, Places] = defaultdict(list)
        for module in self.model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in names:
                    places[names[id(parameter)]].append((module, leaf))
        return places

    def _swap_hollows(self, dtype: torch.dtype) -> None:
        hollows = {id(p): name for name, p in self._at_rest.items() if p.dim() > 1}

        def swap(parameter: nn.Parameter) -> nn.Parameter:
            if id(parameter) in hollows:
                return _hollow(parameter, dtype, self.device)
            return parameter

        replaced = _swap(self.model, swap)
        self._at_rest |= {name: replaced[key] for key, name in hollows.items()}

    def _find(self, layout: Mapping[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
        """Return where each parameter really is: what stock transformers accepts is accepted here."""
        stored, prefix = self.checkpoint.tensors, f"{self.model.base_model_prefix}."
        aliases: dict[str, list[str]] = defaultdict(list)
        for alias, name in self._canonical.items():
            aliases[name].append(alias)
        found: dict[str, tuple[Piece, ...]] = {}
        missing: list[str] = []
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
            if any(stored[piece.name].shape != piece.shape for piece in ways[0]):
                missing.append(name)
            elif any(stored[piece.name].dtype is None for piece in ways[0]):
                raise UnknownLayoutError(f"{name} is stored in a format of its own")
            else:
                found[name] = ways[0]
        if missing:
            raise incomplete_weights(self.checkpoint.name, missing)
        return found

    def _prefetch(self, name: str) -> None:
        """Have the disk busy with what comes next while this parameter is worked on."""
        if len(self.shapes[name]) < 2:
            return  # vectors are read one after the other, and would wait for what was asked for
        self._asked_for.discard(name)  # another pass will have to ask again
        ahead = 0
        following = self._next[name]
        while following is not None and ahead < AHEAD_BYTES:
            for piece in self._pieces[following]:
                if following not in self._asked_for:
                    self.checkpoint.prefetch(piece.name)
                ahead += self.checkpoint.tensors[piece.name].num_bytes
            self._asked_for.add(following)
            following = self._next[following]


class _Visit:
    """A pair of forward hooks: parameters come before a module runs and go when it has."""

    def __init__(self, weights: StoredWeights, parameters: Mapping[str, Places], dtype: torch.dtype) -> None:
        self.weights, self.parameters, self.dtype = weights, parameters, dtype
        self.stack = ExitStack()

    def enter(self, module: nn.Module, args: Any) -> None:
        # Of an embedding, half a gigabyte in float32, a few words are needed.
        looked_up = args[0] if isinstance(module, nn.Embedding) and args else None
        self.stack.enter_context(self.weights._filled(self.parameters, self.dtype, looked_up))

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.stack.close()


def _hollow(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return _frozen(torch.full((), float("nan"), dtype=dtype, device=device).expand(parameter.shape))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _swap(model: nn.Module, replace: Any) -> dict[int, nn.Parameter]:
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
