"""Recipes: defaults of `pat tune` as YAML files."""
