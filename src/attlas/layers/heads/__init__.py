"""How many heads there are and what they share."""
