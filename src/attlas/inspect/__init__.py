"""Looking inside of models: subjects, weights by head, runs kept and patched, `attlas inspect`."""
