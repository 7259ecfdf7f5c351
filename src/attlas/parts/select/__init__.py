"""Selections: the whole cache is held, and each step reads what it needs of it, one paper a file."""
