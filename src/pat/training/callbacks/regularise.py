"""Carries the gradients of the regularisers into the training step of whatever engine there is.

Engines step at different places: DeepSpeed inside `backward`, the others after it; some average gradients over
processes, some keep only a part of each. What they share is the backward pass. So each regularised parameter gets a
hook on its gradient: armed at the beginning of a step, it adds the regulariser's gradient to the first one that
arrives, before any engine sees it (docs/adr/0022). Thus it counts once in a step, whatever the number of micro-batches,
of processes (they add the same, and the mean of that is it) and of times that a checkpointed forward pass is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from pat.errors import RunFailed
from pat.method.losses import Regularized
from pat.surgery.precision import without_autocast

KINDS = ("active", "identity")


@dataclass
class _Term:
    """The regulariser of one parameter."""

    kind: str
    holder: nn.Module
    name: str
    loss: Callable[[Tensor], Tensor]
    weight: float = 0.0
    """Factor of the loss in this step, that of a loss scaler included."""
    is_due: bool = False
    """Whether the gradient is still to be added in this step."""
    value: Tensor | None = None
    """The loss when its gradient was last added."""
    hooked: Tensor | None = None
    handle: RemovableHandle | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module has it now."""
        found: Tensor = getattr(self.holder, self.name)
        return found

    def hook(self) -> None:
        """Put the hook on the parameter as the backward pass knows it."""
        if self.hooked is self.parameter:
            return
        self.release()
        self.hooked = self.parameter
        self.handle = self.hooked.register_hook(self._add)

    def release(self) -> None:
        """Take the hook away."""
        if self.handle is not None:
            self.handle.remove()
        self.hooked = self.handle = None

    def _add(self, gradient: Tensor) -> Tensor | None:
        if not self.is_due:
            return None
        parameter = self.hooked
        assert parameter is not None
        with torch.enable_grad(), without_autocast(parameter):
            leaf = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).requires_grad_()
            loss = self.loss(leaf)
            (own,) = torch.autograd.grad(loss, leaf)
        self.value, self.is_due = loss.detach(), False
        return gradient + (self.weight * own).to(gradient.dtype)


@dataclass
class Regularisers:
    """The regularisers of one adapter, in the order of its modules."""

    terms: dict[tuple[int, str], _Term] = field(default_factory=dict)

    def arm(
        self,
        model: nn.Module,
        parts: Mapping[str, Iterable[Regularized]],
        weights: Mapping[str, float],
        *,
        loss_scale: float = 1.0,
    ) -> None:
        """Have the next backward pass add the gradients; to be called by every process at the beginning of a step.

        Args:
            model: what holds the parameters, wrapped by whatever engine.
            parts: modules with regularised parameters, by the kind of their loss.
            weights: factor of each kind of loss.
            loss_scale: what a loss scaler multiplies the loss by; it will divide the gradients again.
        """
        known, self.terms = self.terms, {}
        for kind, modules in parts.items():
            for module in modules:
                assert isinstance(module, nn.Module)
                for name, loss in module.regularized().items():
                    key = id(module), name
                    if getattr(module, name).requires_grad:
                        term = known.pop(key) if key in known else _Term(kind, module, name, loss)
                        self.terms[key] = term
                        term.weight, term.is_due = loss_scale * weights[kind], True
        for term in known.values():  # of gates that are hard by now, and of parameters that are no longer trained
            term.release()
        for term in self.terms.values():
            if not isinstance(term.parameter, DTensor):
                term.hook()
        if any(term.handle is None for term in self.terms.values()):
            for group in _sharded_groups(model):
                with _unsharded(group):
                    for term in self.terms.values():
                        if term.handle is None and not isinstance(term.parameter, DTensor):
                            term.hook()

    def check(self) -> None:
        """Check that every gradient has been added.

        Raises:
            RunFailed: some have not, so that training would go on without the regularisers.
        """
        missed = [term for term in self.terms.values() if term.is_due]
        if missed:
            raise RunFailed(
                f"The regularisers of {len(missed)} parameters, such as {missed[0].name} of a "
                f"{type(missed[0].holder).__name__}, did not reach the backward pass of this step; expected every one "
                "of them to get a gradient: train in one process, or with DDP, FSDP2 or DeepSpeed."
            )

    def values(self) -> dict[str, float]:
        """Return the unweighted losses, as of the last step."""
        found = {
            kind: [t.value for t in self.terms.values() if t.kind == kind and t.value is not None] for kind in KINDS
        }
        return {kind: sum(value.item() for value in values) for kind, values in found.items()}

    def release(self) -> None:
        """Take all hooks away."""
        for term in self.terms.values():
            term.release()
        self.terms = {}


def loss_scale_of(optimizer: Any) -> float:
    """Return what the loss is multiplied by before the backward pass: 1 unless training is in float16.

    accelerate's optimizer knows its `GradScaler`; DeepSpeed's has a `loss_scale` of its own.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    engine = getattr(optimizer, "optimizer", None)
    return float(getattr(engine, "loss_scale", 1.0) or 1.0)


def _sharded_groups(model: nn.Module) -> Iterator[FSDPModule]:
    yield from (module for module in model.modules() if isinstance(module, FSDPModule))


@contextmanager
def _unsharded(group: FSDPModule) -> Iterator[None]:
    """Have the parameters of one group whole, as its forward pass sees them: the same objects every time."""
    group.unshard()
    try:
        yield
    finally:
        group.reshard()
