"""Adapters over one bank: who is evicted, pins, replacement, failures; and what a batch costs."""

import dataclasses
import itertools
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.errors import InputError
from flora_jax.mixing.bank import Count
from flora_jax.mixing.pairs import list_pairs
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.peft.read import write_adapter
from flora_jax.platforms import CPU
from flora_jax.serve.device import Device
from flora_jax.serve.lattice import Lattice
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.registry import Registry, Version, digest
from flora_jax.serve.registry import version as version_of
from flora_jax.serve.residency import Residency
from flora_jax.serve.scheduler import LoadError
from tests.helpers.random_adapters import KINDS, random_adapter

TARGET = "attn.c_attn"
CONFIG = StarCoderConfig(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2, n_inner=32)


class Pool(Residency):
    """With a registry of its own."""

    def __init__(self, *sizes):
        self.registry = Registry()
        super().__init__(CONFIG, *sizes, is_pinned=self.registry.is_pinned)
        self.register, self.current = self.registry.register, self.registry.current


def pool_of(room, rank=2):
    """Room for so many FLoRAs of a rank."""
    return Pool({TARGET: Count(2 + room * rank, 1, 1)}, {TARGET: Count(rank, 0, 0)})


def flora(seed, rank=2):
    return random_adapter("flora", seed, CONFIG.projections(), 2, rank=rank)


def ready(pool, version):
    """Claims an adapter once it has been read."""
    while (found := pool.claim(version)) == "loading":
        time.sleep(0.001)
    pool.write_claimed()
    return found


def resident(pool, versions):
    return [pool.is_resident(version) for version in versions]


def test_what_waits_for_room_is_read_once_however_small_the_hosts_cache_is(monkeypatch):
    pool = pool_of(1)
    pool.host_bytes = 1
    reads = []
    read = Version.read
    monkeypatch.setattr(Version, "read", lambda v, *rest: reads.append(v.name) or read(v, *rest))
    versions = [pool.register(str(n), flora(n)) for n in range(4)]
    assert ready(pool, versions[0]) == "ready"
    for _ in range(3):
        assert [ready(pool, version) for version in versions[1:]] == ["full"] * 3
    for before, version in itertools.pairwise(versions):
        pool.release(before)
        assert ready(pool, version) == "ready"
    assert sorted(reads) == ["0", "1", "2", "3"]


def test_a_folders_content_is_its_files_whatever_lies_beside_them(tmp_path):
    folder = tmp_path / "one"
    (folder / "adapter_1").mkdir(parents=True)
    for path in (folder, str(folder), tmp_path / "absent", folder / "adapter_1"):
        with pytest.raises(InputError, match="no adapter folder"):
            digest(path)
    (folder / "adapter_config.json").write_text("{}")
    found = digest(folder)
    assert digest(str(folder)) == found
    (folder / "adapter_1" / "adapter_config.json").write_text("{}")
    assert digest(folder) == found
    (folder / "adapter_config.json").write_text("{ }")
    assert digest(folder) != found


def test_the_least_recently_used_leaves_and_those_in_use_stay():
    pool = pool_of(2)
    versions = [pool.register(str(n), flora(n)) for n in range(4)]
    for version in versions[:2]:
        assert ready(pool, version) == "ready"
    assert ready(pool, versions[2]) == "full"
    pool.release(versions[1])
    assert ready(pool, versions[2]) == "ready"
    assert resident(pool, versions) == [True, False, True, False]
    pool.release(versions[0])
    pool.release(versions[2])
    assert ready(pool, versions[0]) == "ready"
    pool.release(versions[0])
    assert ready(pool, versions[3]) == "ready"
    assert resident(pool, versions) == [True, False, False, True]
    assert (pool.loads, pool.evictions) == (4, 2)


def test_a_pinned_adapter_stays_until_its_name_stands_for_another():
    pool = pool_of(1)
    pinned = pool.register("pinned", flora(0), pinned=True)
    other = pool.register("other", flora(1))
    ready(pool, pinned)
    with pytest.raises(LoadError, match="adapter 'other': no room beside the pinned ones"):
        ready(pool, other)
    pool.register("pinned", flora(2))
    assert ready(pool, other) == "full"
    pool.release(pinned)
    assert ready(pool, other) == "ready"


def test_only_adapters_that_make_room_leave():
    """Older ones on another projection stay."""
    second = "mlp.c_fc"
    pool = Pool(
        dict.fromkeys((TARGET, second), Count(2 + 2, 1, 1)),
        dict.fromkeys((TARGET, second), Count(1, 0, 0)),
    )
    versions = [
        pool.register(
            str(n), random_adapter("flora", n, CONFIG.projections(), 2, targets=(target,))
        )
        for n, target in enumerate((TARGET, TARGET, second, second, second))
    ]
    for version in versions:
        assert ready(pool, version) == "ready"
        pool.release(version)
    assert resident(pool, versions) == [True, True, False, True, True]


def test_what_nobody_waits_for_is_not_kept(monkeypatch):
    pool = pool_of(2)
    there = threading.Event()
    read = Version.read
    seen = []

    def delayed(version, *rest):
        assert there.wait(60)
        seen.append(version.name)
        return read(version, *rest)

    monkeypatch.setattr(Version, "read", delayed)
    versions = [pool.register(str(n), flora(n)) for n in range(20)]
    for version in versions:
        assert pool.claim(version) == "loading"
    for version in versions[1:]:
        pool.forget(version)
    there.set()
    assert ready(pool, versions[0]) == "ready"
    assert ready(pool, versions[19]) == "ready"
    # The one behind the first may have been on its way.
    assert set(seen) <= {"0", "1", "19"}


@pytest.mark.parametrize("error", [OverflowError("too large"), RecursionError("too deep")])
def test_whatever_goes_wrong_while_reading_is_that_adapters_error(error, monkeypatch):
    pool = pool_of(1)
    version = pool.register("bad", flora(0))

    def fail(*_):
        raise error

    monkeypatch.setattr(Version, "read", fail)
    with pytest.raises(LoadError, match=f"adapter 'bad': {type(error).__name__}: too"):
        ready(pool, version)
    monkeypatch.undo()
    assert ready(pool, version) == "ready"


def test_the_same_content_again_is_the_same_version_and_other_content_is_not():
    pool = pool_of(2)
    first = pool.register("name", flora(0))
    assert pool.register("name", flora(0)) == first
    assert pool.register("name", flora(1)) != first
    assert pool.current("name") != first
    with pytest.raises(KeyError):
        pool.current("nobody")


def test_what_lies_in_the_bank_is_the_adapter_after_any_number_of_evictions():
    pool = pool_of(3)
    adapters = [flora(n) for n in range(9)]
    versions = [pool.register(str(n), adapter) for n, adapter in enumerate(adapters)]
    rng = np.random.default_rng(0)
    for number in rng.integers(0, 9, 60):
        version = versions[number]
        assert ready(pool, version) == "ready"
        for layer, found in enumerate(pool.layers):
            slots = np.array(pool.of(version, TARGET).multiplicative)
            own = adapters[number].layers[layer][TARGET]
            np.testing.assert_array_equal(found[TARGET].pre_CI[slots], own.down_RI)
        # The reserved slots stay what they are.
        np.testing.assert_array_equal(pool.layers[0][TARGET].pre_CI[:2], [[0] * 16, [1] * 16])
        pool.release(version)


def test_factors_stay_on_the_host_until_they_are_written(tmp_path, monkeypatch):
    """From a folder and from memory, for every kind: no array is made on a device on the way."""
    pool = pool_of(4, rank=5)
    versions = []
    for kind in KINDS:
        adapter = random_adapter(kind, 1, CONFIG.projections(), 2, rank=1 if kind == "ia3" else 2)
        write_adapter(adapter, tmp_path / kind)
        versions += [version_of(kind, tmp_path / kind), version_of(f"{kind} in memory", adapter)]
        del adapter
    before = {id(array) for array in jax.live_arrays()}
    made = []
    for name in ("array", "asarray"):
        monkeypatch.setattr(jnp, name, lambda *a, name=name, **k: made.append(name))
    monkeypatch.setattr(jax, "device_put", lambda *a, **k: made.append("device_put"))
    for own in versions:
        prepared = own.read(CONFIG)
        leaves = [*jax.tree.leaves([vars(c) for layer in prepared.layers for c in layer.values()])]
        if not isinstance(own.source, Path):
            leaves += jax.tree.leaves(own.source.layers)
        assert leaves
        assert {type(leaf) for leaf in leaves} == {np.ndarray}
    assert not made
    assert {id(array) for array in jax.live_arrays()} <= before
    # The write itself gets host arrays, once.
    given = []
    write = pool._writer
    monkeypatch.undo()
    pool._writer = lambda layers, *new: given.append(new) or write(layers, *new)
    own = pool.register("flora", tmp_path / "flora")
    assert ready(pool, own) == "ready"
    assert len(given) == 1
    assert {type(leaf) for leaf in jax.tree.leaves(given)} == {np.ndarray}


def test_an_adapter_that_does_not_fit_is_an_error_with_the_numbers(tmp_path):
    pool = pool_of(2)
    with pytest.raises(LoadError, match=r"attn.c_attn has \(3, 0, 0\) components .* at most \(2,"):
        ready(pool, pool.register("large", flora(0, rank=3)))
    wide = random_adapter("flora", 0, dataclasses.replace(CONFIG, n_embd=32).projections(), 2)
    with pytest.raises(LoadError, match=r"adapter 'wide': .* the base model has 16"):
        ready(pool, pool.register("wide", wide))
    with pytest.raises(InputError, match="no adapter folder"):
        pool.register("absent", tmp_path / "absent")


def test_a_batchs_lists_are_those_of_its_slots_whatever_was_listed_before():
    """Also after an eviction gave the same adapters other slots."""
    pool = pool_of(3)
    versions = [pool.register(str(n), flora(n)) for n in range(5)]
    options = EngineOptions(max_num_seqs=4, block_size=4, max_num_batched_tokens=99)
    lattice = Lattice(pool, options, 64, CPU)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        chosen = rng.choice(5, 3, replace=False)
        for number in chosen:
            assert ready(pool, versions[number]) == "ready"
        names = [versions[n] for n in rng.choice(chosen, int(rng.integers(1, 5)))]
        for _ in range(2):
            shape, pairs = lattice.decode(names, 9)
            padded = [*names, *[None] * (shape.rows - len(names))]
            expected = list_pairs(pool, padded, lattice.pair_sizes(shape))
            jax.tree.map(np.testing.assert_array_equal, pairs, expected)
        seen.add(str(pairs))
        for number in chosen:
            pool.release(versions[number])
    assert len(seen) > 20


def test_a_batch_costs_the_same_operations_among_8_and_512_resident_adapters():
    """XLA's count of operations; bytes grow by the arguments alone."""
    costs = []
    for room in (8, 512):
        pool = pool_of(room)
        versions = [pool.register(str(n), flora(n)) for n in range(4)]
        for version in versions:
            ready(pool, version)
        options = EngineOptions(max_num_seqs=4, block_size=4, max_num_batched_tokens=99)
        lattice = Lattice(pool, options, 64, CPU)
        device = Device(init_model(CONFIG, 0), pool, lattice, options, CPU)
        shape, pairs = lattice.decode(versions, 32)
        work = dataclasses.replace(device.nothing(shape), pairs=pairs)
        compiled = device.decode_call(work, 1, False).lower().compile()
        costs.append((compiled.cost_analysis()["flops"], compiled.memory_analysis()))
        jax.clear_caches()
    (few, few_memory), (many, many_memory) = costs
    assert few == many
    assert few_memory.temp_size_in_bytes == many_memory.temp_size_in_bytes
    assert few_memory.argument_size_in_bytes < many_memory.argument_size_in_bytes
