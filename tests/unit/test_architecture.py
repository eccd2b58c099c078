"""The shape of the house: imports point one way, and the method stays pure torch.

The sources are read without importing them, so that an import hidden in a function or behind ``TYPE_CHECKING`` counts
like any other.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "pat.errors pat.paths pat.families pat.widths pat.ranges pat.shape pat.prunable pat.budget pat.config_file "
        "pat.kinds pat.named pat.option pat.options pat.loading pat.nll pat.general_text pat.report pat.recipes "
        "pat.questions pat.ranks pat.readers pat.serving pat.strict_json pat.whole_files",
        "pat.method",
        "pat.surgery",
        "pat.file_sizes",
        "pat.tuner",
        "pat.checkpoint",
        "pat.data",
        "pat.training",
        "pat.evaluation pat.benchmark pat.plan pat.demo pat.formats pat.launch",
        "pat pat.registration",  # the public names
        "pat.cli",
        "pat.__main__",
    )
)
"""Folders and modules of the package, lowest first. A module imports from lower layers and from its own."""

FORBIDDEN_IN_METHOD = ("transformers", "peft", "trl", "accelerate", "datasets")

MAX_LINES = 300
"""Past this, two things live in one module."""


def _module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted((SOURCE / "pat").rglob("*.py"))}


def _imported_names(module: str, path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute name) of every import; ``from a import b`` is ``a.b`` if that is our module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else base


def _layer_key(module: str) -> str:
    """Return the entry of LAYERS that `module` belongs to: its first two name parts."""
    return ".".join(module.split(".")[:2])


def _layer(module: str) -> int:
    key = _layer_key(module)
    for rank, names in enumerate(LAYERS):
        if key in names:
            return rank
    raise LookupError(f"{key} has no layer yet: give it one in LAYERS of {Path(__file__).name}")


def _is_ours(name: str) -> bool:
    return name == "pat" or name.startswith("pat.")


def _upward_imports(module: str, imports: Iterator[tuple[int, str]]) -> list[str]:
    """Return every import of `module` that points at a higher layer, as readable lines."""
    found = []
    for line, name in imports:
        if not _is_ours(name):
            continue
        if _layer(name) > _layer(module):
            found.append(f"{module}:{line} imports {name}")
    return found


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) > 10, f"found only {sorted(MODULES)}: is {SOURCE} the source folder?"
    for module in MODULES:
        _layer(module)


def test_imports_point_one_way() -> None:
    upward = [
        violation
        for module, path in MODULES.items()
        for violation in _upward_imports(module, _imported_names(module, path))
    ]
    assert not upward, "imports against the layers:\n" + "\n".join(upward)


@pytest.mark.parametrize(
    "source",
    [
        "from pat.tuner import PatModel",
        "from pat import tuner",
        "def f():\n    import pat.tuner.model",
        "from ..tuner.model import PatModel",
        "from pat import PatConfig",
    ],
)
def test_an_upward_import_is_seen(source: str) -> None:
    module, path = "pat.surgery.example", SOURCE / "pat" / "surgery" / "example.py"
    assert len(_upward_imports(module, _imported_names(module, path, source))) == 1


def test_folders_of_one_layer_do_not_import_each_other_in_circles() -> None:
    uses: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        targets = {_layer_key(name) for _, name in _imported_names(module, path) if _is_ours(name)}
        uses.setdefault(_layer_key(module), set()).update(targets)
    circles = [f"{a} and {b}" for a in uses for b in uses[a] if a < b and a in uses.get(b, set())]
    assert not circles, f"these import each other: {circles}"


def test_the_method_is_pure_torch() -> None:
    reached, todo = set[str](), [name for name in MODULES if name.startswith("pat.method")]
    assert todo
    offences = []
    while todo:
        module = todo.pop()
        reached.add(module)
        for line, name in _imported_names(module, MODULES[module]):
            if name in MODULES and name not in reached:
                todo.append(name)
            if name.split(".")[0] in FORBIDDEN_IN_METHOD:
                offences.append(f"{module}:{line} imports {name}")
    assert not offences, "\n".join(offences)


def test_modules_stay_small() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    large = {module: count for module, count in lines.items() if count > MAX_LINES}
    assert not large, f"more than {MAX_LINES} lines, ask which two things live there: {large}"
