"""Tasks: the data and the scores of `attlas compare`, one file a task."""
