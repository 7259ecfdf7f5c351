"""Modules for feature maps [batch, channels, height, width], one paper per file."""
