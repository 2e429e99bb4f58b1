"""Hugging Face's name, shape and orientation of every parameter; its axes; buffers beside the parameters.

Knows nothing of JAX arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from flora_jax.models.axes import Rules
from flora_jax.models.family import Stored, Tensor
from flora_jax.models.starcoder.config import StarCoderConfig

# c_attn is split on its outputs. Without multi_query each head's query, key and value stand together, so
# the cuts fall between heads. With it the output is [all queries | key | value] and the cuts fall
# anywhere: XLA moves the few columns of a token's activations that lie on the wrong side and hands every
# device the one key and value. That is small beside the alternative, reading the whole kernel (1/12 of
# a block) on every device at every step.
AXES: Rules = (
    ("wte.embedding", ("vocab", "embed")),
    ("wpe.embedding", ("position", "embed")),
    ("h.*.ln_1.*", ("embed",)),
    ("h.*.attn.c_attn.kernel", ("embed", "qkv")),
    ("h.*.attn.c_attn.bias", ("qkv",)),
    ("h.*.attn.c_proj.kernel", ("heads", "embed")),
    ("h.*.attn.c_proj.bias", ("embed",)),
    ("h.*.ln_2.*", ("embed",)),
    ("h.*.mlp.c_fc.kernel", ("embed", "mlp")),
    ("h.*.mlp.c_fc.bias", ("mlp",)),
    ("h.*.mlp.c_proj.kernel", ("mlp", "embed")),
    ("h.*.mlp.c_proj.bias", ("embed",)),
    ("ln_f.*", ("embed",)),
    ("lm_head", ("embed", "vocab")),
)
_BUFFER = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.attn\.)?(bias|masked_bias)")


def hf_tensors(config: StarCoderConfig) -> dict[str, Tensor]:
    """Every parameter of the model by our dotted path."""
    width = config.n_embd
    table = {
        "wte.embedding": Tensor("transformer.wte.weight", (config.vocab_size, width), False),
        "wpe.embedding": Tensor("transformer.wpe.weight", (config.n_positions, width), False),
    }

    def norm(path: str) -> None:
        table[f"{path}.scale"] = Tensor(f"transformer.{path}.weight", (width,), False)
        table[f"{path}.bias"] = Tensor(f"transformer.{path}.bias", (width,), False)

    for layer in range(config.n_layer):
        norm(f"h.{layer}.ln_1")
        norm(f"h.{layer}.ln_2")
        for target, (inputs, outputs) in config.projections().items():
            path = f"h.{layer}.{target}"
            name = f"transformer.{path}"
            table[f"{path}.kernel"] = Tensor(f"{name}.weight", (outputs, inputs), True)
            table[f"{path}.bias"] = Tensor(f"{name}.bias", (outputs,), False)
    norm("ln_f")
    if not config.tie_word_embeddings:
        table["lm_head"] = Tensor("lm_head.weight", (config.vocab_size, width), True)
    return table


def buffer_problems(tensor: Stored, config: StarCoderConfig) -> Iterator[str]:
    """What is wrong with a tensor that is no parameter: nothing with a causal mask kept as a buffer."""
    where = f"{tensor.name} in {tensor.file.name}"
    match = _BUFFER.fullmatch(tensor.name)
    if match is None or int(match[1] or 0) >= config.n_layer:
        yield f"{where} is unexpected, of shape {tensor.shape}"
    elif tensor.dtype is None:
        yield f"{where} is {tensor.dtype_name}, expected a mask"
    elif match[2] == "masked_bias":
        value = tensor.read(0, 1).astype(np.float64) if tensor.shape in ((), (1,)) else None
        # -1e4 is -9984 in bfloat16.
        if value is None or not value[0] <= -9e3:
            seen = f"shape {tensor.shape}" if value is None else f"value {value[0]:g}"
            yield f"{where} has {seen}, expected one number of about -1e4 or less"
    elif not _is_causal(tensor, config.n_positions):
        yield (
            f"{where}, of shape {tensor.shape}, is not the causal mask of {config.n_positions} "
            "positions (ones on and below the diagonal)"
        )


def _is_causal(tensor: Stored, positions: int) -> bool:
    *ones, rows, columns = tensor.shape if len(tensor.shape) >= 2 else (0, 0)
    if (rows, columns) != (positions, positions) or any(size != 1 for size in ones):
        return False
    step = max(1, (1 << 20) // columns)
    return all(
        np.array_equal(
            tensor.read(start * columns, min(rows, start + step) * columns).astype(np.float32),
            np.tri(min(step, rows - start), columns, start, dtype=np.float32).reshape(-1),
        )
        for start in range(0, rows, step)
    )
