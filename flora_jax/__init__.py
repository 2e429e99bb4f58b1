"""FLoRA in JAX: one base model, a different low-rank adapter for every request of a batch.

The public names are imported when they are first used, so that ``import flora_jax`` is quick and brings
no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flora_jax.llm import LLM as LLM
    from flora_jax.llm import init_adapter as init_adapter
    from flora_jax.llm import load_model as load_model
    from flora_jax.llm import read_adapter as read_adapter
    from flora_jax.peft.read import write_adapter as write_adapter
    from flora_jax.serve.engine import Engine as Engine
    from flora_jax.serve.options import EngineOptions as EngineOptions
    from flora_jax.serve.request import Completion as Completion
    from flora_jax.serve.request import Request as Request
    from flora_jax.serve.request import SamplingParams as SamplingParams
    from flora_jax.serve.updates import Update as Update
    from flora_jax.train.options import TrainOptions as TrainOptions
    from flora_jax.train.run import train as train

# By public name the module that has it.
_PUBLIC = {
    "LLM": "llm", "init_adapter": "llm", "load_model": "llm", "read_adapter": "llm",
    "write_adapter": "peft.read", "Engine": "serve.engine", "EngineOptions": "serve.options",
    "Request": "serve.request", "SamplingParams": "serve.request", "Completion": "serve.request",
    "Update": "serve.updates", "TrainOptions": "train.options",
}  # fmt: skip
__all__ = [*_PUBLIC, "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # The package of this name, which may be called.
        return importlib.import_module("flora_jax.train")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flora_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"flora_jax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
