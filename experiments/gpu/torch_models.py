"""transformers' GPTBigCode with random weights made on the device. Needs torch and transformers."""

from __future__ import annotations

from typing import Any

from flora_jax.models.starcoder.config import PRESETS


def gpt_big_code(preset: str, layers: int, positions: int, dtype: Any, device: str) -> Any:
    """A model of a preset's shape with so many layers (0: its own), without dropout."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    own = PRESETS[preset]
    config = transformers.GPTBigCodeConfig(
        vocab_size=own.vocab_size, n_positions=max(512, positions), n_embd=own.n_embd,
        n_layer=layers or own.n_layer, n_head=own.n_head, n_inner=own.n_inner or 4 * own.n_embd,
        multi_query=True, activation_function="gelu_pytorch_tanh", attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
