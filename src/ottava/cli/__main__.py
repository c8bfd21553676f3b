"""`python -m ottava.cli`."""

from ottava.cli import main

main()
