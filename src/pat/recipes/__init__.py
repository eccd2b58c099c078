"""Recipes: defaults of `pat tune` as YAML files. What the method needs beyond is the defaults of `PatConfig`."""

from __future__ import annotations

from importlib import resources
from typing import Any

from pat.errors import PatError

RECIPES = ("default", "paper")


def recipe_defaults(name: str) -> dict[str, Any]:
    """Return the flags a recipe stands for; every other one lies over the default recipe.

    Raises:
        PatError: no such recipe.
    """
    import yaml

    if name not in RECIPES:
        raise PatError(f"Got recipe={name!r}; expected one of {', '.join(RECIPES)}.")
    flags: dict[str, Any] = {"recipe": name}
    for layer in dict.fromkeys((RECIPES[0], name)):
        flags |= yaml.safe_load(resources.files(__name__).joinpath(f"{layer}.yaml").read_text(encoding="utf-8"))
    return flags
