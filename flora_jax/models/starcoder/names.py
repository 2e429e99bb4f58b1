"""Hugging Face's name, shape and orientation of every parameter.

Knows nothing of files or of JAX arrays.
"""

from __future__ import annotations

from typing import NamedTuple

from flora_jax.models.starcoder.config import StarCoderConfig


class HFTensor(NamedTuple):
    """A parameter as Hugging Face has it; ``transposed`` when ours is its transpose."""

    name: str
    shape: tuple[int, ...]
    transposed: bool


def hf_tensors(config: StarCoderConfig) -> dict[str, HFTensor]:
    """Every parameter of the model by our dotted path."""
    width = config.n_embd
    table = {
        "wte.embedding": HFTensor("transformer.wte.weight", (config.vocab_size, width), False),
        "wpe.embedding": HFTensor("transformer.wpe.weight", (config.n_positions, width), False),
    }

    def norm(path: str) -> None:
        table[f"{path}.scale"] = HFTensor(f"transformer.{path}.weight", (width,), False)
        table[f"{path}.bias"] = HFTensor(f"transformer.{path}.bias", (width,), False)

    for layer in range(config.n_layer):
        norm(f"h.{layer}.ln_1")
        norm(f"h.{layer}.ln_2")
        for target, (inputs, outputs) in config.projections().items():
            path = f"h.{layer}.{target}"
            name = f"transformer.{path}"
            table[f"{path}.kernel"] = HFTensor(f"{name}.weight", (outputs, inputs), True)
            table[f"{path}.bias"] = HFTensor(f"{name}.bias", (outputs,), False)
    norm("ln_f")
    if not config.tie_word_embeddings:
        table["lm_head"] = HFTensor("lm_head.weight", (config.vocab_size, width), True)
    return table
