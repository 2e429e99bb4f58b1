"""Flags of XLA that a GPU gains by, set before JAX starts where its XLA knows them.

An unknown flag ends the process that meets it, so each is tried in a process of its own, once for a
version of jaxlib. Knows nothing of programs; never imports JAX.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

# Loops become part of CUDA graphs: else the host launches each iteration, and waits for its condition.
FLAGS = {"--xla_gpu_enable_command_buffer": "+WHILE"}
_TRY = "import jax; jax.devices()"


def set_flags(cache: Path, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Adds the flags to ``XLA_FLAGS``, those that are known and that the user has not set.

    Nothing is done without an NVIDIA device, with JAX kept from it, or once JAX has been imported.

    Args:
        cache: directory in which the answers are kept.
        environment: whose ``XLA_FLAGS`` is changed.

    Returns:
        The flags that were added.
    """
    if "jax" in sys.modules or not _has_gpu(environment):
        return []
    given = environment.get("XLA_FLAGS", "")
    added = [
        f"{name}={value}"
        for name, value in FLAGS.items()
        if name not in given and is_known(f"{name}={value}", cache)
    ]
    if added:
        environment["XLA_FLAGS"] = " ".join([*given.split(), *added])
    return added


def keep_from_missing_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps JAX on the CPU where there is a compiler for an NVIDIA device and no such device.

    Without it JAX shows a traceback at its start and goes on.
    """
    if "JAX_PLATFORMS" in environment or any(Path("/dev").glob("nvidia[0-9]*")):
        return
    plugins = importlib.util.find_spec("jax_plugins")
    places = (plugins.submodule_search_locations if plugins else None) or ()
    names = {path.name for place in places for path in Path(place).iterdir() if path.is_dir()}
    if names and all(name.startswith(("xla_cuda", "__")) for name in names):
        environment["JAX_PLATFORMS"] = "cpu"


def is_known(flag: str, cache: Path) -> bool:
    """Whether the installed XLA starts with a flag."""
    file = cache / "xla_flags.json"
    from importlib import metadata  # Takes as long as all the rest of this module.

    key = f"{metadata.version('jaxlib')} {flag}"
    answers = _read(file)
    if key in answers:
        return answers[key]
    # On a CPU: the flags are read in the same place, and the device stays free.
    tried = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", _TRY], env=tried, capture_output=True)
    answers[key] = found.returncode == 0
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(json.dumps(answers))
        part.replace(file)
    except OSError:  # It is tried again next time.
        return answers[key]
    return answers[key]


def _read(file: Path) -> dict[str, bool]:
    """The answers of a file; none where it is damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(known, bool) for known in found.values())
    return found if whole else {}


def _has_gpu(environment: MutableMapping[str, str]) -> bool:
    """Whether JAX could use an NVIDIA device; a guess from files, for JAX must not start."""
    wanted = environment.get("JAX_PLATFORMS", "cuda").split(",")
    if not {"cuda", "gpu", ""} & set(wanted):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) and environment.get("CUDA_VISIBLE_DEVICES") != ""
