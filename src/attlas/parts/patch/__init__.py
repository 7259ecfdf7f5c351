"""Patches: what replaces something of a run, one a file."""
