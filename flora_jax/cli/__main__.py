"""``python -m flora_jax.cli``."""

from flora_jax.cli import main

main()
