"""Layers with a memory besides their keys: trained while they read, or kept from what was read."""
