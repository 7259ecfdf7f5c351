"""Studies: a theory paper's central claim as an experiment, one paper a file."""
