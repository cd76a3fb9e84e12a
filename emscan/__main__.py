"""`python -m emscan`."""

from emscan.cli import main

main()
