"""Attention that meets few pairs, chosen by a pattern or by what the tokens hold."""
