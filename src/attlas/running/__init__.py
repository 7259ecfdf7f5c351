"""`attlas run`: a system is fitted, asked and scored, cell by cell."""
