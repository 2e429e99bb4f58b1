"""Loading holds little more than the model: peak memory at the shape of a 164M StarCoder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flora_jax.checkpoints.checkpoint import load_model, save_orbax
from flora_jax.checkpoints.tensor_files import write_safetensors
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.models.starcoder.names import hf_tensors

MEASURE = """
import json, sys
import jax, jax.numpy as jnp
from flora_jax.checkpoints.checkpoint import load_model

def high_water():
    # Not getrusage: its maximum survives exec, so that a large parent would hide everything.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

if sys.argv[3] == "orbax":
    import orbax.checkpoint  # Part of the idle interpreter, not of the model's loading.
jnp.zeros(8).block_until_ready()
idle = high_water()
model = load_model(sys.argv[1], sys.argv[2])
leaves = jax.tree.leaves(model.params)
jax.block_until_ready(leaves)
print(json.dumps([high_water() - idle, sum(leaf.nbytes for leaf in leaves)]))
"""


def write_random(directory: Path) -> None:
    """A float32 checkpoint of 164M parameters; one draw is repeated, drawing them all is slow."""
    config = PRESETS["164m"]
    draw = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    float32 = np.dtype(np.float32)
    write_safetensors(
        directory / "model.safetensors",
        [
            (name, shape, float32, lambda shape=shape: np.resize(draw, shape))
            for name, shape, _ in hf_tensors(config).values()
        ],
    )


def peak_ratios(directory: Path, form: str) -> dict[str, float]:
    """By dtype, peak memory above the idle interpreter in sizes of the loaded model."""
    ratios = {}
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", MEASURE, str(directory), dtype, form]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        above, model = json.loads(done.stdout)
        ratios[dtype] = above / model
    return ratios


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)


def test_loading_peaks_under_1_3_times_the_model(tmp_path):
    write_random(tmp_path / "hf")
    ratios = peak_ratios(tmp_path / "hf", "safetensors")
    assert max(ratios.values()) < 1.3, ratios


@pytest.mark.slow
def test_restoring_from_orbax_peaks_under_1_3_times_the_model(tmp_path):
    write_random(tmp_path / "hf")
    save_orbax(load_model(tmp_path / "hf"), tmp_path / "orbax")
    ratios = peak_ratios(tmp_path / "orbax", "orbax")
    assert max(ratios.values()) < 1.3, ratios
