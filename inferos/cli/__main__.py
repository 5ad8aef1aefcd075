"""`python -m inferos.cli`: the command line without its script."""

from inferos.cli import main

main()
