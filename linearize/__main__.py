"""`python -m linearize` is the `linearize` command."""

from linearize.cli import main

main()
