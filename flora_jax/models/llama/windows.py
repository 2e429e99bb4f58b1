"""Sliding windows by layer, in each of the ways that a config.json says them.

Knows nothing of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flora_jax.errors import InputError

Windows = tuple[int | None, ...]
_FULL, _SLIDING = "full_attention", "sliding_attention"


class WindowFields(Protocol):
    """How the configurations of a model type say what each layer sees."""

    types: Mapping[str, str]
    """The fields and their types, as :class:`flora_jax.models.config_fields.Fields` has them."""

    def read(self, values: dict[str, Any], layers: int) -> Windows:
        """Takes the fields out of ``values``; a layer's window or ``None`` for all of them.

        Raises:
            InputError: values that contradict one another.
        """

    def write(self, windows: Windows) -> dict[str, Any]:
        """The fields that mean these windows."""


class NoWindow:
    """Every layer sees everything."""

    types: Mapping[str, str] = {}

    def read(self, values: dict[str, Any], layers: int) -> Windows:
        """See :class:`WindowFields`."""
        return (None,) * layers

    def write(self, windows: Windows) -> dict[str, Any]:
        """See :class:`WindowFields`."""
        return {}


class OneWindow:
    """``sliding_window`` is that of all layers; null means none."""

    types: Mapping[str, str] = {"sliding_window": "int | None"}

    def read(self, values: dict[str, Any], layers: int) -> Windows:
        """See :class:`WindowFields`."""
        return (_positive(values.pop("sliding_window")),) * layers

    def write(self, windows: Windows) -> dict[str, Any]:
        """See :class:`WindowFields`."""
        return {"sliding_window": windows[0]}


class LayeredWindows:
    """``sliding_window`` where ``use_sliding_window`` is true, in the layers that ``layer_types`` says,
    or in those from ``max_window_layers`` on where it is null.
    """

    types: Mapping[str, str] = {
        "sliding_window": "int | None",
        "use_sliding_window": "bool",
        "max_window_layers": "int",
        "layer_types": "list | None",
    }

    def read(self, values: dict[str, Any], layers: int) -> Windows:
        """See :class:`WindowFields`."""
        window, used = values.pop("sliding_window"), values.pop("use_sliding_window")
        first, kinds = values.pop("max_window_layers"), values.pop("layer_types")
        window = _positive(window) if used else None
        if kinds is None:
            return tuple(None if n < first else window for n in range(layers))
        if len(kinds) != layers:
            raise InputError(f"layer_types has {len(kinds)} entries, expected {layers}")
        wrong = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
        if wrong:
            raise InputError(f"layer_types has {wrong[0]!r}, expected {_FULL} or {_SLIDING}")
        if window is None and _SLIDING in kinds:
            raise InputError(
                f"layer_types has {_SLIDING!r}, but sliding_window is null or use_sliding_window false"
            )
        return tuple(window if kind == _SLIDING else None for kind in kinds)

    def write(self, windows: Windows) -> dict[str, Any]:
        """See :class:`WindowFields`."""
        sliding = [number for number, window in enumerate(windows) if window is not None]
        return {
            "sliding_window": windows[sliding[0]] if sliding else None,
            "use_sliding_window": bool(sliding),
            "max_window_layers": sliding[0] if sliding else len(windows),
            "layer_types": [_FULL if window is None else _SLIDING for window in windows],
        }


def _positive(window: int | None) -> int | None:
    if window is not None and window < 1:
        raise InputError(f"sliding_window is {window}, expected a positive integer or null")
    return window
