"""Names of the flags of `pat tune`, read from the source of the classes that declare them.

Their import takes seconds: with the names at hand, a misspelt flag is refused before it.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

_CLASSES = (
    ("pat", "training/options.py", "RunOptions"),
    ("pat", "training/options.py", "DistillOptions"),
    ("pat", "tuner/options.py", "PatOptions"),
    ("pat", "shape.py", "ShapeOptions"),
    ("trl", "trainer/model_config.py", "ModelConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
"""Package, file and name of every dataclass whose fields are flags, bases included."""


def flag_names() -> frozenset[str] | None:
    """Return the names of all flags, or None where the libraries declare them in another way than is known here."""
    names: set[str] = set()
    bases: set[str] = set()
    for package, file, name in _CLASSES:
        declared = _declaration(package, file, name)
        if declared is None or declared.keywords or not all(isinstance(base, ast.Name) for base in declared.bases):
            return None
        bases |= {base.id for base in declared.bases if isinstance(base, ast.Name)}
        lines = [line for line in declared.body if isinstance(line, ast.AnnAssign)]
        lines = [line for line in lines if not _is_no_flag(line)]
        names |= {line.target.id for line in lines if isinstance(line.target, ast.Name)}
    return frozenset(names) if bases <= {name for *_, name in _CLASSES} else None


def _is_no_flag(line: ast.AnnAssign) -> bool:
    """Tell whether a line declares a variable of the class, or a field that no caller can give."""
    value = line.value
    keywords = value.keywords if isinstance(value, ast.Call) else []
    hidden = any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)
    return hidden or "ClassVar" in ast.unparse(line.annotation)


def _declaration(package: str, file: str, name: str) -> ast.ClassDef | None:
    try:
        found = importlib.util.find_spec(package)
        folders = found.submodule_search_locations if found is not None else None
        tree = ast.parse(Path(next(iter(folders or [])), file).read_text(encoding="utf-8"))
    except (OSError, StopIteration, SyntaxError, ValueError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
