"""An H100 to compile for ahead of time, where no GPU is; nothing runs on it."""

import functools

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

# What XLA's compiler asks of a device. The operations a clock, by XLA's number of a type: 10 is
# float16, 16 bfloat16, 11 float32, 2 int8.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  matrix_unit_description {
    rate_infos { key: 10 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 } }
    rate_infos { key: 16 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 } }
    rate_infos { key: 11 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 256 } }
    rate_infos { key: 2 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 1024 } }
  }
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def on_one_h100():
    """The same at every call: devices of two topologies do not mix in a program."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())


def placed_on_h100(tree):
    """Shapes and dtypes of a tree's leaves as arrays of one H100; skips where its compiler is absent."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax-cuda13-pjrt")
    everywhere = on_one_h100()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree
    )
