"""Hugging Face transformers' ``generate`` on the base model, without adapters; see protocol.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import protocol


def load(options: protocol.Options) -> Any:
    """The model in float32, which never ends a sequence by itself."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def draw(model: Any, prompts: list[list[int]], new_tokens: int, **settings: Any) -> list[list[int]]:
    """Greedy continuations of prompts of one length, as a static batch."""
    import torch

    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            **settings,
        )
    return out[:, ids.shape[1] :].tolist()


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options()
    assert not options.adapters, "transformers alone has no adapter per request: see peft_.py"
    model = load(options)

    def generate(prompts: list[list[int]], names: protocol.Names, n: int) -> list[list[int]]:
        return draw(model, prompts, n)

    packages = protocol.versions("torch", "transformers")
    protocol.serve_generation(say, options, packages, generate)


if __name__ == "__main__":
    protocol.run(main)
