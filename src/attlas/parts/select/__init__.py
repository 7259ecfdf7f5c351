"""Selections: the whole cache is held, and each step reads what it needs of it."""

from attlas.parts.select.selection import Selection

__all__ = ["Selection"]
