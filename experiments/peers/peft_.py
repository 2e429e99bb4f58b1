"""PEFT's mixed batch: ``generate(adapter_names=[…])``, an adapter for every row, or with --plain none for
all; see protocol.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hf
import protocol

BASE = "__base__"  # PEFT's name for no adapter.


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options(
        plain=dict(action="store_true", help="a first adapter is there, but no row has it")
    )
    from peft import PeftModel

    (first, folder), *others = options.adapters.items()
    model = PeftModel.from_pretrained(hf.load(options), folder, adapter_name=first)
    if options.rest.plain:
        others, options = [], dataclasses.replace(options, adapters={})
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    model.eval()

    def generate(prompts: list[list[int]], names: protocol.Names, n: int) -> list[list[int]]:
        return hf.draw(model, prompts, n, adapter_names=[name or BASE for name in names])

    def alone(prompts: list[list[int]], names: protocol.Names, n: int) -> list[list[int]]:
        """With the adapter made the active one: not by the mixed batch's way."""
        (name,) = names
        if name is None:
            with model.disable_adapter():
                return hf.draw(model, prompts, n)
        model.set_adapter(name)
        return hf.draw(model, prompts, n)

    packages = protocol.versions("torch", "transformers", "peft")
    protocol.serve_generation(say, options, packages, generate, alone)


if __name__ == "__main__":
    protocol.run(main)
