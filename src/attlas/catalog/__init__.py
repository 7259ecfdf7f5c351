"""The papers and what of them is implemented."""
