"""Strict numerics for every test, and the small things many of them need."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The two workers of a run share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Most tests compile far longer than they run. Those about bits and about the command's own
# programs ask for XLA's usual optimisations: see `optimised`.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# XLA maps each kernel of a compiled program into memory by itself, some 3,000 mappings for a test of the
# engine; at Linux's usual limit of 65,530 a process dies without a trace.
MOST_MAPPINGS = 20_000


def mappings() -> int:
    """Of this process; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True)
def bounded_mappings():
    """Drops the programs of earlier tests before there are too many."""
    if mappings() > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def optimised():
    """XLA as users have it, for tests whose outcome could depend on it."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora and tokenizers, which only some machines have beside the checkout."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: real corpora and tokenizers are not part of the project")
    return DATA
