"""What attaches to a pretrained model, one paper a file."""
