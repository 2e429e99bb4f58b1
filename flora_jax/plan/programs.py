"""The engine's decode program with abstract arguments, ready to be compiled for a card.

The one place of this room that knows how a step is called. Knows nothing of compilers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.bank import Count, Slots, empty_layers
from flora_jax.adapters.pairs import group_lattice, list_pairs, pair_lattice
from flora_jax.plan import memory
from flora_jax.plan.setting import Setting
from flora_jax.platforms import GPU
from flora_jax.serve import steps
from flora_jax.starcoder.cache import Paging
from flora_jax.starcoder.model import Model, abstract_model
from flora_jax.starcoder.quantize import quantize_abstract

_HLO_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "s8", "uint8": "u8"}
_STEPS = 16


class Residents:
    """Adapters that are all alike, one after another in the bank, named by number."""

    def __init__(self, setting: Setting):
        self.targets = tuple(setting.room())
        self._counts = {target: setting.count(target)[:2] for target in self.targets}

    def most(self, target: str) -> tuple[int, int]:
        """See :class:`flora_jax.adapters.bank.Residents`."""
        return self._counts[target]

    def of(self, name: Any, target: str) -> Slots:
        """See :class:`flora_jax.adapters.bank.Residents`."""
        multiplicative, additive = self._counts[target]
        first, more = 2 + name * multiplicative, 1 + name * additive
        return Slots(
            tuple(range(first, first + multiplicative)), tuple(range(more, more + additive))
        )


def model_of(setting: Setting) -> Model:
    """The model's shapes and dtypes."""
    model = abstract_model(setting.config, jnp.dtype(setting.dtype))
    if setting.quantize == "none":
        return model
    return quantize_abstract(model, setting.quantize)  # type: ignore[arg-type]


def state_of(setting: Setting) -> Any:
    """The state's shapes and dtypes."""
    dtype = jnp.dtype(setting.dtype)
    return jax.eval_shape(
        functools.partial(
            steps.init_state, setting.config, setting.max_num_seqs, memory.pages(setting),
            setting.page, dtype,
        )
    )  # fmt: skip


def bank_of(setting: Setting) -> Any:
    """The bank's shapes and dtypes."""
    room = {target: Count(*count) for target, count in setting.room().items()}
    config = setting.config
    return jax.eval_shape(lambda: empty_layers(room, config.projections(), config.n_layer))


def decode(setting: Setting, place: Callable[[Any], Any]) -> Callable[[], Any]:
    """What lowers the decode program in which every row has an adapter and the largest span.

    ``place`` puts shapes and dtypes where the program is to run.
    """
    rows, residents = setting.max_num_seqs, Residents(setting)
    sizes = {}
    for target in residents.targets:
        multiplicative, additive = residents.most(target)
        pairs, groups = pair_lattice(rows, multiplicative - 1), group_lattice(rows, additive)
        sizes[target] = pairs[-1], groups[-1]
    names = [row % max(1, setting.residents) for row in range(rows)]
    width = -(-setting.context // setting.page)
    model = model_of(setting)
    arguments = place(
        (
            model.params, bank_of(setting), list_pairs(residents, names, sizes), state_of(setting),
            np.zeros(rows, np.int32),
            Paging(np.zeros((rows, width), np.int32), attention=GPU.decode_attention),
            np.int32(_STEPS), np.bool_(False),
        )
    )  # fmt: skip
    return lambda: steps.decode.lower(model.graph, *arguments, most=_STEPS)


def weight_shapes(setting: Setting) -> set[tuple[str, tuple[int, ...]]]:
    """HLO's dtype and the dimensions of every projection's kernel, as held and in the activations'
    dtype, and of the embedding.
    """
    config, own = setting.config, _HLO_DTYPES[setting.dtype]
    found: set[tuple[str, tuple[int, ...]]] = {(own, (config.vocab_size, config.n_embd))}
    for leaf in jax.tree.leaves(model_of(setting).params):
        if len(leaf.shape) == 2 and min(leaf.shape) > setting.max_num_seqs:
            found.add((_HLO_DTYPES[np.dtype(leaf.dtype).name], tuple(leaf.shape)))
    return found
