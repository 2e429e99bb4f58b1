"""What the configurations of families with separate projections and rotary positions have in common.

Knows nothing of arrays: importing it brings no JAX in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flora_jax.errors import InputError
from flora_jax.models.config_fields import check_multiple
from flora_jax.models.rotary import Rotary


class SelfAttentionShape:
    """The part of a configuration that follows from transformers' names of its fields."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rotary: Rotary

    if TYPE_CHECKING:

        @property
        def head_dim(self) -> int:
            """A field of one family, derived in another."""

    def check_heads(self) -> None:
        """Raises ``InputError`` where queries cannot share keys, or a head cannot be turned."""
        check_multiple(
            "num_attention_heads", self.num_attention_heads,
            "num_key_value_heads", self.num_key_value_heads,
        )  # fmt: skip
        if self.head_dim % 2:
            raise InputError(
                f"config: head_dim is {self.head_dim}, expected an even number: rotary positions turn "
                "pairs"
            )

    @property
    def n_layer(self) -> int:
        return self.num_hidden_layers

    @property
    def n_head(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads

    @property
    def n_positions(self) -> int:
        return self.rotary.scaling.longest(self.max_position_embeddings)

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5

    def attention_widths(self) -> dict[str, tuple[int, int]]:
        """The (input, output) features of the four projections of attention, by adapter target."""
        width = self.hidden_size
        queries, keys = self.n_head * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (width, queries),
            "self_attn.k_proj": (width, keys),
            "self_attn.v_proj": (width, keys),
            "self_attn.o_proj": (queries, width),
        }
