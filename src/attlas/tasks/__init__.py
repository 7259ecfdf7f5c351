"""Tasks: the data and the scores of `attlas compare` and of `attlas train`, one file a task."""
