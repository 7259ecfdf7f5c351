"""The page of one model looked into: its heads, their patterns, flow and circuits, in one file."""
