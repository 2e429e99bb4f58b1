"""Converts an adapter into one of another kind: the same weights where it can be, else the nearest.

    python convert/adapters.py ADAPTER --base MODEL --to flora --output OUTPUT [--approximate ...]

The same as ``flora-jax convert-adapter``, with all its options.
"""

from __future__ import annotations

from flora_jax.cli.convert_adapter import convert_adapter
from flora_jax.cli.program import run_function

if __name__ == "__main__":
    run_function(convert_adapter)
