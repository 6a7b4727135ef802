"""``python -m dnp``: the command line."""

from dnp.cli import main

main()
