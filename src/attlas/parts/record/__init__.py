"""Recorders: what attention does, reduced block by block."""
