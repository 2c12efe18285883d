"""The command line as `python -m isocost`."""

from isocost.cli import main

main()
