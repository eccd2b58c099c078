"""Checks of an adapted model, when it is loaded and when it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel

from pat.errors import PatError
from pat.tuner.layer import NAMES

logger = logging.getLogger(__name__)


class GuardedForward(LoraModel):
    """A tuner that says what would come out wrong without a word."""

    _has_warned = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; say once if it is trained and nobody moves its mask, as `PatCallback` does."""
        # A compiled forward pass would be compiled anew once the flag has changed.
        if not torch.compiler.is_compiling() and not self._has_warned and self.training and torch.is_grad_enabled():
            self._has_warned = True
            gates = [gate for name in self.active_adapters for gate in cast(Any, self).all_gates(name)]
            if any(gate.milestone_step is None and gate.num_kept < gate.size for gate in gates):
                logger.warning(
                    "A PAT adapter is trained whose mask nobody moves, so that nothing will be cut; put PatCallback() "
                    "into the trainer's callbacks, or call set_step(step, milestone_step) before each step."
                )
        return super().forward(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take values over; refuse those of an adapter that was made with other options, which peft passes over.

        Raises:
            PatError: there are some.
        """
        own = {name for name, _ in chain(self.named_parameters(remove_duplicate=False), self.named_buffers())}
        given = (name for name in state_dict if name.startswith(prefix) and _is_adapters(name))
        homeless = [name for name in given if name.removeprefix(prefix) not in own]
        if homeless:
            raise PatError(
                f"Got an adapter whose file has tensors that its configuration has no place for ({len(homeless):,}, "
                f"such as {min(homeless).removeprefix(prefix)}): an option such as axes, rotation, refit, use_dora, "
                "operator_rank or target_modules is another than it was saved with, in adapter_config.json or by "
                "config=…; put it back."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse a batch of several adapters: masks and operators act on whole batches.

        Raises:
            PatError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise PatError(
                f"Got adapter_names={kwargs['adapter_names']}; PAT runs a batch with one adapter. Call "
                "set_adapter(name) before it, or disable_adapter() for the base."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield


def _is_adapters(name: str) -> bool:
    """Tell by its name whether a tensor belongs to an adapter, and not to the base."""
    return any(part in NAMES or part.startswith("lora_") for part in name.split("."))
