"""One projection, a different FLoRA in every row: one matrix product, equal to the explicit weights.

python examples/one_layer.py
"""

import jax
import jax.numpy as jnp

from flora_jax import adapters
from flora_jax.adapters import flora

rows, tokens, inputs, outputs, rank = 4, 10, 64, 96, 4
keys = jax.random.split(jax.random.key(0), rows + 2)
own = [flora.init(key, inputs, outputs, rank=rank) for key in keys[:rows]]
x_BTI = jax.random.normal(keys[-2], (rows, tokens, inputs))
W_IO = jax.random.normal(keys[-1], (inputs, outputs))

y_BTO = flora.apply(adapters.stack(own), x_BTI, W_IO)

for row, one in enumerate(own):
    explicit_IO = W_IO * (one.down_RI.T @ one.up_RO) / rank  # W ∘ s·(B A), the paper's mean
    difference = jnp.abs(x_BTI[row] @ explicit_IO - y_BTO[row]).max()
    print(f"row {row}: largest difference from its explicit weight {difference:.1e}")
    assert difference < 1e-3
