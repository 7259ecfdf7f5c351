"""What layers of several papers are built on; no paper of its own."""
