"""The one error that loading a model raises."""

from __future__ import annotations


class ModelLoadError(Exception):
    """A model cannot be loaded. The message names the file, the thing in it, its value and what is allowed."""
