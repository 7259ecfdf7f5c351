"""Base classes of the kinds that are neither a layer nor a part."""
