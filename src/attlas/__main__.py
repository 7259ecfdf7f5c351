"""`python -m attlas`."""

from attlas.cli import main

main()
