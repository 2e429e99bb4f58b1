"""Model checkpoints on disk: safetensors, orbax, the hub, tokenizers; ``open_checkpoint`` opens one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora_jax.checkpoints.checkpoint import (
        CheckpointError,
        Opened,
        load_model,
        open_checkpoint,
    )

__all__ = ["CheckpointError", "Opened", "load_model", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flora_jax.checkpoints import checkpoint

    return getattr(checkpoint, name)
