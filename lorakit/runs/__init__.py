"""Runs: the recipe that says everything about one, read from YAML and written back resolved."""

from .recipe import DataSection, ModelSection, Recipe, load_recipe, save_recipe

__all__ = ["DataSection", "ModelSection", "Recipe", "load_recipe", "save_recipe"]
