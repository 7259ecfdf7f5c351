"""Rooms of attlas."""
