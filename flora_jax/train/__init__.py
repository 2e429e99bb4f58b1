"""Training: documents to token batches, the loss, the jitted step and the resumable loop.

``flora_jax.train(options, output)`` trains; so does calling this package, which has the same name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Importing ``flora_jax.train.options`` puts this package where ``flora_jax.train`` is looked up."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from flora_jax.train.run import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
