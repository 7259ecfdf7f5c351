"""Quantised caches: keys and values in few bits or few dimensions, one paper a file."""
