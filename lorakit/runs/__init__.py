"""Runs: the recipe that describes a whole run, read from YAML and saved with every default filled in."""

from .recipe import DataSection, ModelSection, Recipe, load_recipe, save_recipe

__all__ = ["DataSection", "ModelSection", "Recipe", "load_recipe", "save_recipe"]
