"""Papers that convert or fine-tune a pretrained model, one a file; their base is `Adapter`."""
