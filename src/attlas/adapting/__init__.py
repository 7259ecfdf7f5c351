"""`attlas adapt`: run an adapter on a pretrained model, and tell what it changed."""
