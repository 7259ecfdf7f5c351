"""Steerers: attention that is told where to look, one paper a file."""
