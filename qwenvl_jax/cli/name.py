"""What the program is called."""

PROG = "qwenvl-jax"
