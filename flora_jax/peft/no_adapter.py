"""What lies at a path that was taken for an adapter's folder: for messages that name the likely slip."""

from __future__ import annotations

from pathlib import Path

from flora_jax.shipped import near_adapters

# Beside its adapters' folders a run of ``flora-jax train`` writes these from its first step on.
RUN_FILES = ("config.json", "metrics.jsonl")


def no_adapter(path: str | Path) -> str:
    """One line on a path that holds no adapter: what is there instead, and what is near it."""
    folder = Path(path)
    if not folder.exists():
        shipped = [] if folder.is_absolute() else near_adapters(str(path))
        if not shipped:
            return f"{path}: no adapter folder is there (adapter_config.json and its weights)"
        near = ", ".join(shipped)
        return (
            f"{path}: no adapter folder is there, nor is one of this name shipped; near it: {near}"
        )
    if not folder.is_dir():
        return f"{path}: is a file, expected an adapter's folder"
    inner = ", ".join(map(str, adapters_in(folder)))
    if is_run(folder):
        return f"{path} is a run of flora-jax train; its adapters: {inner or 'none yet'}"
    said = f"{path}: no adapter folder: adapter_config.json is missing"
    weights = sorted(one.name for one in folder.glob("adapter_model.*"))
    if weights:
        return f"{said} beside {weights[0]}"
    return f"{said}; adapters in it: {inner}" if inner else said


def is_run(folder: Path) -> bool:
    """Whether this is the output of ``flora-jax train``, which holds a folder for each adapter."""
    return all((folder / name).is_file() for name in RUN_FILES)


def adapters_in(folder: Path) -> list[Path]:
    """The adapters' folders directly in a folder, by name."""
    return sorted(config.parent for config in folder.glob("*/adapter_config.json"))
