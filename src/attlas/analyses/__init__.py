"""Analyses: papers that look inside of a whole model, one paper a file."""
