"""`python -m emscan`."""

from emscan.cli import main

if __name__ == "__main__":  # worker processes of the probe's code import this module again
    main()
