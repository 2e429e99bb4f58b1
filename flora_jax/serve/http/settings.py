"""What a server allows; without HTTP and without JAX."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flora_jax.errors import InputError

_BOTH = "expected --admin-key and --adapter-root or neither of them"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The server's own limits; the engine has others.

    Args:
        api_keys: for everything below ``/v1/``, ``/tokenize`` and ``/detokenize``; none leaves them open.
        admin_keys: for loading and unloading adapters, which is off without one.
        adapter_root: below it lie the adapters that may be loaded.
        max_adapter_rank: of an adapter that is loaded while the server runs.
        max_body_bytes: of a request.
        request_timeout_s: from a request's arrival to its last token.
        stalled_s: how long a client may take nothing of a stream.
        metric_adapters: so many adapters have metrics of their own; later ones share the name "other".

    Raises:
        InputError: a key that no header can carry, a root that is no directory, or a bound that is none.
    """

    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    admin_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    adapter_root: Path | None = None
    max_adapter_rank: int = 16
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    stalled_s: float = 30.0
    metric_adapters: int = 32

    def __post_init__(self) -> None:
        for name in ("api_keys", "admin_keys"):
            for key in getattr(self, name):
                if not (key and key.isascii() and key.isprintable()) or key != key.strip():
                    raise InputError(
                        f"{name}: a key is empty or has characters that no header carries"
                    )
        if self.admin_keys and self.adapter_root is None:
            raise InputError(f"an admin key is given and no adapter root, {_BOTH}")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise InputError(f"{self.adapter_root}: no such directory, expected the adapters' root")
        if self.adapter_root is not None and not self.admin_keys:
            raise InputError(f"an adapter root is given and no admin key, {_BOTH}")
        for name in ("max_body_bytes", "request_timeout_s", "stalled_s", "max_adapter_rank"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected above 0")
