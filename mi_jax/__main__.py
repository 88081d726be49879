"""`python -m mi_jax` is `mi-jax`."""

from mi_jax.cli import entry

entry()
