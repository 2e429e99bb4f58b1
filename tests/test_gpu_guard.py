"""StarCoder 15B's steps, compiled ahead of time for an H100: memory, donation, copies."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_target import placed_on_h100

from flora_jax.adapters.bank import Count, Slots, empty_layers, patch, write
from flora_jax.adapters.pairs import Form, group_lattice, list_pairs, pair_lattice, row_components
from flora_jax.serve import steps
from flora_jax.starcoder.cache import Paging
from flora_jax.starcoder.config import PRESETS
from flora_jax.starcoder.model import abstract_model

pytestmark = pytest.mark.usefixtures("optimised")
ROWS, CONTEXT, PAGE = 32, 2048, 16
TARGET = "attn.c_attn"
MIB = 1 << 20
CARD = 80e9
CONFIG = dataclasses.replace(PRESETS["15b"], dtype="float16")


class Residents:
    """32 adapters of a rank, multiplicative or additive, one after another in the bank."""

    targets = (TARGET,)

    def __init__(self, multiplicative, additive):
        self.counts = multiplicative, additive

    def most(self, target):
        return self.counts

    def of(self, name, target):
        if name is None:
            return Slots()
        mul, add = self.counts
        first = (1,) if mul == 1 else tuple(range(2 + name * mul, 2 + (name + 1) * mul))
        return Slots(first, tuple(range(1 + name * add, 1 + (name + 1) * add)))


ADAPTERS = {"none": None, "flora8": Residents(8, 0), "lora8": Residents(1, 8)}


@functools.cache
def shared():
    model = abstract_model(CONFIG, jnp.float16)
    pages = ROWS * CONTEXT // PAGE
    state = jax.eval_shape(
        functools.partial(steps.init_state, CONFIG, ROWS, pages, PAGE, jnp.dtype(jnp.float16))
    )
    return model, state


def bank_of(residents):
    if residents is None:
        return [{}] * CONFIG.n_layer
    mul, add = residents.counts
    room = {TARGET: Count(2 + ROWS * mul, 1 + ROWS * add, 1)}
    return jax.eval_shape(lambda: empty_layers(room, CONFIG.projections(), CONFIG.n_layer))


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled(step, model, arguments, **static):
    arrays = placed_on_h100((model.params, *arguments))
    return step.lower(model.graph, *arrays, **static).compile()


def assert_copies_no_weight(program, model):
    """No copy instruction has the shape of a projection or of the embedding, either way round."""
    kernels = {leaf.shape for leaf in jax.tree.leaves(model.params) if leaf.size > 10**6}
    kernels |= {shape[::-1] for shape in kernels}
    copied = set()
    for line in program.as_text().splitlines():
        if found := re.search(r"= f16\[(\d+),(\d+)\]\S* (copy|transpose)\(", line):
            copied.add((int(found[1]), int(found[2])))
    assert copied & kernels == set()


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_decoding_fits_the_card_and_donates_the_cache(kind):
    residents = ADAPTERS[kind]
    model, state = shared()
    pairs = {}
    if residents is not None:
        mul, add = residents.counts
        sizes = pair_lattice(ROWS, mul - 1)[-1], group_lattice(ROWS, add)[-1]
        pairs = list_pairs(residents, list(range(ROWS)), {TARGET: sizes})
    table = Paging(np.zeros((ROWS, CONTEXT // PAGE), np.int32))
    program = compiled(
        steps.decode, model,
        (bank_of(residents), pairs, state, np.zeros(ROWS, np.int32), table, np.int32(16), np.bool_(1)),
        most=16,
    )  # fmt: skip
    memory = program.memory_analysis()
    print(kind, memory.temp_size_in_bytes / MIB, memory.peak_memory_in_bytes / 1e9)
    assert memory.alias_size_in_bytes >= bytes_of(state.cache)
    assert memory.temp_size_in_bytes <= 64 * MIB
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < CARD
    assert_copies_no_weight(program, model)


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_prefilling_2048_tokens_fits_the_card_and_donates_the_cache(kind):
    residents = ADAPTERS[kind]
    model, state = shared()
    rows, length = 4, 512
    own = {}
    if residents is not None:
        form = Form(*{"flora8": (8, 0), "lora8": (1, 16)}[kind], (TARGET,))
        own = row_components(residents, list(range(rows)), form)
    table = Paging(np.zeros((rows, CONTEXT // PAGE), np.int32))
    program = compiled(
        steps.prefill, model,
        (bank_of(residents), own, state, table, np.zeros((rows, length), np.int32),
         np.zeros(rows, np.int32), np.zeros(rows, np.int32)),
    )  # fmt: skip
    memory = program.memory_analysis()
    print(kind, memory.temp_size_in_bytes / MIB, memory.peak_memory_in_bytes / 1e9)
    assert memory.alias_size_in_bytes >= bytes_of(state.cache)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < CARD
    assert_copies_no_weight(program, model)


def test_writing_an_adapter_donates_the_bank():
    residents = ADAPTERS["flora8"]
    layers = bank_of(residents)
    room = {TARGET: Count(2 + ROWS * 8, 1, 1)}
    most = {TARGET: Count(8, 0, 0)}
    values, slots = patch(None, {}, room, most, CONFIG.projections(), CONFIG.n_layer)
    program = write.lower(*placed_on_h100((layers, values, slots))).compile()
    assert program.memory_analysis().alias_size_in_bytes >= bytes_of(layers)
    assert program.memory_analysis().temp_size_in_bytes <= 64 * MIB
