"""How a query and a key are compared, and what positions add."""
