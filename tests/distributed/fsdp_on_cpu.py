"""Runs `pat` with FSDP2 on CPUs, where accelerate would fall back to DDP: only the choice of the engine is replaced."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from pat.cli import main

original = AcceleratorState.__init__


def choose_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Do on CPUs what accelerate does on GPUs (its `AcceleratorState.__init__`)."""
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type


# No public switch has accelerate enter FSDP without a GPU; everything after this choice is its own code.
AcceleratorState.__init__ = choose_fsdp  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
