"""Trainable mechanisms, one paper a file, a folder a family."""
