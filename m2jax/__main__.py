"""`python -m m2jax`: the command line."""

import sys

from m2jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
