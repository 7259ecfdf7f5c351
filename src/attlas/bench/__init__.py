"""`attlas bench`: what this machine can do, what attlas does on it, and what is installed beside it."""
