"""Programs compiled ahead of time for a card that is not there, by XLA's own compiler for it.

The compiler comes with ``jax-cuda13-pjrt`` of jaxlib's version and needs ``ptxas`` and libdevice of a
CUDA 13 toolkit, both in the extra ``plan``; nothing runs, so nothing is autotuned.
Knows nothing of what a program is for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata as metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flora_jax.errors import InputError
from flora_jax.plan.cards import MATRIX_UNITS, Card

_PLUGIN, _PACKAGE = "jax_plugins.xla_cuda13", "jax-cuda13-pjrt"
_NEEDS = "--compile needs {}: pip install 'flora-jax[plan]'"
# XLA's number of a type, and its rate as twice float16's: float16, bfloat16, float32, int8.
_RATES = ((10, 2), (16, 2), (11, 1), (2, 4))


class Compiled(NamedTuple):
    """A program and what it needs: bytes of its arguments, of what lies beside them while it runs, and
    of the arguments that its results take over.
    """

    text: str
    arguments: int
    temporaries: int
    donated: int


def target_config(card: Card) -> str:
    """What XLA's compiler asks of a device, as the text of its protocol buffer."""
    major, minor = card.capability
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    rates = "\n".join(
        f"    rate_infos {{ key: {key} value {{ clock_rate_ghz: {card.matrix_clock_ghz} "
        f"units_per_core: {MATRIX_UNITS} ops_per_clock: {card.matrix_ops * times // 2} }} }}"
        for key, times in _RATES
    )
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {card.shared_per_core}
  threads_per_core_limit: {card.threads_per_core} core_count: {card.cores}
  fpus_per_core: {card.fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {card.peak_bandwidth:.0f} l2_cache_size: {card.l2_bytes}
  clock_rate_ghz: {card.clock_ghz}
  device_memory_size: {card.memory_bytes} shared_memory_per_block_optin: {card.shared_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  matrix_unit_description {{
{rates}
  }}
  name: "{card.title}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{card.title}"
"""


def toolkits(environment: Mapping[str, str]) -> Iterator[Path]:
    """Where a CUDA toolkit may lie: the pip packages, the usual variables, /usr/local/cuda, the PATH."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or ()) if found else ():
        yield Path(place) / "cu13"
    for name in ("CUDA_ROOT", "CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    yield Path("/usr/local/cuda")
    for program in ("nvcc", "ptxas"):
        path = shutil.which(program, path=environment.get("PATH", ""))
        if path is not None:
            yield Path(path).resolve().parents[1]


def find_toolkit(places: Iterator[Path] | None = None) -> Path:
    """The first place that has ``bin/ptxas`` and libdevice.

    Raises:
        InputError: none has.
    """
    for place in toolkits(os.environ) if places is None else places:
        ptxas = shutil.which("ptxas", path=str(place / "bin"))
        if ptxas is not None and any((place / "nvvm/libdevice").glob("libdevice*.bc")):
            return place
    raise InputError(
        _NEEDS.format("ptxas and libdevice of a CUDA 13 toolkit (CUDA_HOME, /usr/local/cuda, PATH)")
    )


def check_compiler() -> None:
    """Whether there is a compiler for a GPU.

    Raises:
        InputError: there is none, or one of another version than jaxlib's.
    """
    try:
        there = importlib.util.find_spec(_PLUGIN) is not None
        found, wanted = metadata.version(_PACKAGE), metadata.version("jaxlib")
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        there = False
    if not there:
        raise InputError(_NEEDS.format(_PACKAGE))
    if found.split(".")[:3] != wanted.split(".")[:3]:
        raise InputError(
            f"{_PACKAGE} is {found}, expected jaxlib's version: pip install {_PACKAGE}=={wanted}"
        )


def one_device(card: Card) -> Any:
    """A sharding on one card."""
    return everywhere(card, 1)


def everywhere(card: Card, devices: int) -> Any:
    """A sharding of what is whole on each of so many cards of one machine."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh(card, devices), PartitionSpec())


@functools.cache
def mesh(card: Card, devices: int) -> Any:
    """A mesh of so many cards as :func:`flora_jax.models.sharding.make_mesh` makes it. The same at every
    call: devices of two topologies do not mix in a program.

    Raises:
        InputError: there is no compiler for it.
    """
    check_compiler()
    find_toolkit()
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{devices}", target_config=target_config(card)
        )
    except NotImplementedError as error:  # JAX looked for a driver, and did not take the plugin.
        raise InputError(
            f"no compiler for {card.title} ({error}), start with JAX_PLATFORMS=cpu"
        ) from None
    return topologies.make_mesh(topology, (1, devices), ("data", "tensor"))


def placed(card: Card, tree: Any) -> Any:
    """Shapes and dtypes of a tree's leaves as arrays of one card."""
    import jax

    place = one_device(card)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )


@contextlib.contextmanager
def _not_cached() -> Iterator[None]:
    """Nothing is written to the persistent cache: a program for a card that is not there can't be read
    back, and compiling it a second time would warn of that.
    """
    import jax

    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_lowered(lower: Callable[[], Any], *, library_products: bool = True) -> Compiled:
    """Compiles what ``lower`` gives, for the card that its arguments are placed on.

    With ``library_products`` all products are cuBLASLt's, else XLA may make kernels of its own, among
    which it would choose by running them; those alone cast a quantised weight as they read it.
    """
    options = {
        "xla_gpu_cuda_data_dir": str(find_toolkit()),
        "xla_gpu_enable_triton_gemm": not library_products,
    }
    with _not_cached():
        program = lower().compile(compiler_options=options)
    memory = program.memory_analysis()
    return Compiled(
        program.as_text(),
        int(memory.argument_size_in_bytes),
        int(memory.temp_size_in_bytes),
        int(memory.alias_size_in_bytes),
    )
