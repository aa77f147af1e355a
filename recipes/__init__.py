"""Recipes: TOML data that ships with qwq-quant, read through importlib.resources.

This file is why they are found in an editable install: there, a folder without it becomes a
namespace package, and importlib.resources takes setuptools' placeholder in its path for a folder.
"""
