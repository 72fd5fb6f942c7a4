"""`python -m qwenvl_jax`: the same as `qwenvl-jax`."""

import sys

from qwenvl_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
