"""Views: the table, the picture and the self-contained page of a comparison."""
