"""Makes the method known to peft without importing peft: at once where it is imported already, else right after it is.

Registering needs peft, torch and the tuner, seconds of imports that `pat --help` and a script that has its own order
of imports need not pay. See docs/adr/0012.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_TUNER = "pat.tuner"
"""The package that registers the method at the end of its import."""


def register_with_peft() -> None:
    """Register the method now, or have it registered as soon as anybody imports peft."""
    if "peft" in sys.modules:
        import_module(_TUNER)
    else:
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder:
    """Lets the other finders find peft, and has the method registered at the end of peft's import."""

    def __init__(self) -> None:
        self._asks_others = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return peft's own spec, its loader followed by the registration; None for everything else."""
        if name != "peft" or self._asks_others:  # by another one of these, where pat was imported twice
            return None
        self._asks_others = True
        try:
            finders = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((found for found in finders if found is not None), None)
        finally:
            self._asks_others = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            _quieten_bitsandbytes()
            load(module)
            if self in sys.meta_path:  # asked for the spec alone, as by `find_spec`, nothing is registered yet
                sys.meta_path.remove(self)
            if _TUNER not in sys.modules:  # whose import may be what imports peft
                import_module(_TUNER)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _quieten_bitsandbytes() -> None:
    """Have bitsandbytes, which peft imports, not warn of a kernel that could be installed (on AVX512-BF16)."""
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if noisy.level == logging.NOTSET:
        noisy.setLevel(logging.ERROR)
