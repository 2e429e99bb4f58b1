"""What comes with the package under a name: the model "mini" and adapters such as "flora/perl"."""

from __future__ import annotations

import difflib
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
_MODELS = ("mini",)


def model_source(name: str) -> str:
    """The path of a shipped model, or ``name`` itself; an existing path wins."""
    return str(ASSETS / name) if name in _MODELS and not Path(name).exists() else name


def adapter_source(name: str | Path) -> Path:
    """The folder of a shipped adapter, or ``name`` itself as a path; an existing path wins."""
    path = Path(name)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    shipped = ASSETS / "adapters" / path
    return shipped if (shipped / "adapter_config.json").is_file() else path


def shipped_adapters() -> tuple[str, ...]:
    """The names of all that ship, ``kind/language``, in order."""
    folders = (ASSETS / "adapters").glob("*/*/adapter_config.json")
    return tuple(sorted(f"{one.parent.parent.name}/{one.parent.name}" for one in folders))


def near_adapters(name: str) -> list[str]:
    """Names of shipped adapters that one may have meant: all of the kind or the language that ``name``
    is, else those that are spelt much like it, else all of the kind that it begins with.
    """
    text, names = name.lower(), shipped_adapters()
    return (
        [one for one in names if text in one.split("/")]
        or difflib.get_close_matches(text, names, cutoff=0.75)
        or [one for one in names if one.startswith(f"{text.partition('/')[0]}/")]
    )
