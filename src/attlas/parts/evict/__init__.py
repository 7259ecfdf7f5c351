"""Cache policies: what of a prompt's keys and values stays, one paper a file."""
