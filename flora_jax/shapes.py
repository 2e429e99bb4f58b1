"""The one key of dimension letters, and the check that arrays have them.

A name such as ``x_BTI`` lists its array's axes:

    B  rows of the batch (one request each)     T  tokens of this call
    S  positions of the key/value cache         V  vocabulary
    L  blocks of the key/value cache            M  blocks of one row, padded
    D  model width                              F  inner width of the MLP
    H  query heads                              G  key/value heads
    Q  query heads per key/value head           K  width of one head
    I  input features of a projection           O  its output features
    R  rank (components of one adapter)         J  components per row, padded
    P  multiplicative pairs of a ragged batch   A  groups of additive components
    C  slots of a component bank                N  adapters of a bank; drawn tokens
    E  stop tokens of a row, padded             W  window of the largest logits
    X  rows of a product, flattened
"""

from __future__ import annotations

from typing import Any


def check_shapes(where: str, **arrays: Any) -> dict[str, int]:
    """Binds each letter of the given names to one size.

    ``check_shapes("flora.apply", x_BTI=x, W_IO=W)`` returns ``{"B": …, "T": …, "I": …, "O": …}``.
    Arrays that are ``None`` are passed over. Sizes are static, so a check costs nothing once traced.

    Raises:
        ValueError: the rank of an array or the size of a letter does not fit; the message has the
            found and the expected shape.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        letters = name.rpartition("_")[2]
        shape = tuple(array.shape)
        if len(shape) != len(letters):
            raise ValueError(
                f"{where}: {name} has shape {shape}, expected {len(letters)} axes ({letters})"
            )
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{where}: {name} has shape {shape}, but {letter} is {sizes[letter]} "
                    f"in {owner[letter]}"
                )
            owner.setdefault(letter, name)
    return sizes
