"""Tasks of `attlas compare`: one file a task, found through the decorator that it carries."""
