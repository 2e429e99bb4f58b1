"""An H100 to compile for ahead of time, where no GPU is; nothing runs on it."""

import pytest

from flora_jax.errors import InputError
from flora_jax.plan.ahead import placed
from flora_jax.plan.cards import CARDS


def placed_on_h100(tree):
    """Shapes and dtypes of a tree's leaves as arrays of one H100; skips where its compiler is absent."""
    try:
        return placed(CARDS["h100"], tree)
    except InputError as error:
        pytest.skip(str(error))
