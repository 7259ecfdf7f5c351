"""Attention without a softmax over pairs: its middle is a state, or a few sums, of constant size."""
