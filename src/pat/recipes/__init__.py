"""Recipes: defaults of `pat tune` as YAML files."""

from __future__ import annotations

from importlib import resources
from typing import Any

from pat.errors import PatError

RECIPES = ("default", "paper")


def recipe_defaults(name: str) -> dict[str, Any]:
    """Return the flags a recipe stands for.

    Raises:
        PatError: no such recipe.
    """
    import yaml

    if name not in RECIPES:
        raise PatError(f"Got recipe={name!r}; expected one of {', '.join(RECIPES)}.")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return {"recipe": name, **yaml.safe_load(text)}
