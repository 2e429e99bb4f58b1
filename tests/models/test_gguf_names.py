"""What a GGUF's metadata says of positions, as llama.cpp reads it."""

import numpy as np
import pytest

from flora_jax.errors import InputError
from flora_jax.models.gguf_names import read_rotary
from flora_jax.models.rotary import Linear, Rotary


@pytest.mark.parametrize("factor", [4.0, 2, 0.5])
def test_a_factor_without_a_type_is_a_linear_scalings(factor):
    own = {"rope.freq_base": 50_000.0, "rope.scaling.factor": factor}
    assert read_rotary(own, None, 8) == Rotary(50_000.0, Linear(factor))
    assert read_rotary(own | {"rope.scaling.type": "linear"}, None, 8) == Rotary(
        50_000.0, Linear(factor)
    )
    assert read_rotary(own | {"rope.scaling.type": "none"}, None, 8) == Rotary(50_000.0)
    with pytest.raises(InputError, match="type is 'linear' beside rope_freqs"):
        read_rotary(own, np.ones(4), 8)


@pytest.mark.parametrize("own", [{}, {"rope.scaling.factor": 0.0}, {"rope.scaling.factor": 1.0}])
def test_no_factor_or_one_that_changes_nothing_leaves_positions_plain(own):
    assert read_rotary(own, None, 8) == Rotary(10_000.0)
    assert read_rotary(own, np.ones(4), 8).base == 10_000.0
