"""``python -m flora_jax``."""

from flora_jax.cli import main

main()
