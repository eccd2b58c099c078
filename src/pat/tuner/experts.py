"""Gates before the writers of experts, which are one bare parameter in a fused module, and what goes into them.

No module lies between gate_up_proj and down_proj, so that there is nothing to hook there. The gates act on down_proj
itself, as a parametrization of torch's for as long as the module of the experts runs. In this way peft has LoRA act on
bare parameters, and ours comes behind it. Every implementation of the experts reads the parameter, and so sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from pat.tuner.layer import GateLayer

READER, WRITER = "gate_up_proj", "down_proj"
"""Names of the stacked parameters in the modules of transformers, whichever family they are of."""


class ExpertsGateLayer(GateLayer):
    """The gates of all adapters before the writers of one layer's experts."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[ExitStack] = []

    def attach(self, experts: nn.Module) -> None:
        """Hook the module of the experts, below whatever wraps it."""
        self.detach()
        for module in _innermost(experts):
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.gates]
        running = ExitStack()
        self._running.append(running)  # first, since `_leave` is called even if what follows fails
        for name in names:
            # Not checked by a first call, whose result would be cached before all gates are there.
            parametrize.register_parametrization(module, WRITER, self.gate(name), unsafe=True)
            running.callback(_remove_last, module)
        running.enter_context(parametrize.cached())  # the eager implementation reads it once for each expert

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._running.pop().close()


class ExpertsWatch:
    """Second moments of what goes into the writers of one layer's experts, at the tokens that are routed to them.

    Each token counts by the square of its routing weight, as it does in the squared error of what the experts put out.

    Args:
        experts: their module, its adapters disabled.
    """

    def __init__(self, experts: nn.Module) -> None:
        self.experts: Any = next(_innermost(experts))
        num_experts, _, size = getattr(self.experts, WRITER).shape
        weight: Tensor = getattr(self.experts, READER)
        self.moments = weight.new_zeros(num_experts, size, size).float()
        """Sums over tokens, `(experts, size, size)` in float32."""
        self.num_tokens = [0] * num_experts

    def __call__(self, rows: Tensor, routed: Tensor, routing_weights: Tensor) -> None:
        """Add tokens.

        Args:
            rows: what goes into the experts, `(tokens, d)`.
            routed: numbers of the experts that each token goes to, `(tokens, k)`.
            routing_weights: of those, `(tokens, k)`.
        """
        readers: Tensor = getattr(self.experts, READER)
        rows = rows.to(readers.dtype)
        for number in routed.unique().tolist():
            token, place = (routed == number).nonzero(as_tuple=True)
            gate, up = linear(rows[token], readers[number]).chunk(2, dim=-1)
            inner = (self.experts.act_fn(gate) * up).float() * routing_weights[token, place].unsqueeze(1)
            self.moments[number].addmm_(inner.mT, inner)
            self.num_tokens[number] += len(token)


def tokens_per_routed(config: Any) -> int:
    """Return how many tokens a model reads for each that an expert sees, on average; 1 if it has no experts."""
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return math.ceil(num_experts / config.num_experts_per_tok) if num_experts else 1


def count_experts(experts: nn.Module) -> int:
    """Return how many experts a module holds."""
    return len(getattr(next(_innermost(experts)), WRITER))


def _innermost(experts: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules below peft's wrappers: the base's first, then the copies that are trained as a whole."""
    if isinstance(experts, ModulesToSaveWrapper):
        for module in (experts.original_module, *experts.modules_to_save.values()):
            yield from _innermost(module)
    elif isinstance(experts, ParamWrapper):
        yield from _innermost(experts.base_layer)
    else:
        yield experts


def _remove_last(module: nn.Module) -> None:
    """Remove the parametrization that came last; torch can only remove all of a parameter's, those of peft as well."""
    listed = cast(Any, module.parametrizations)[WRITER]
    if len(listed) > 1:
        del listed[-1]
    else:
        parametrize.remove_parametrizations(module, WRITER, leave_parametrized=False)
