"""Tiny GGUF files of models with random weights."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import sentencepiece_ids as spm

MERGES = ("Ġ Ġ", "ĠĠ Ġ", "1 2", "Ġ 1", "Ġ a", "Ġa b", "a b", "Ã ©", "c Ã©", "ab cÃ©", "Ċ Ċ")
# One that no merge makes: only a tokenizer that takes whole pieces finds it.
WHOLE = "xyz"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = (
    *CONTROL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    WHOLE,
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}"
)


# A SentencePiece vocabulary: bytes, pieces that are joined in this order, single characters.
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_PIECES = "▁▁ ▁a ▁ab ab abc bc ▁the th he the er in ▁i ing ▁▁▁▁ ▁▁▁ 12".split()
_LETTERS = [*"▁abcdefghijklmnopqrstuvwxyz0123456789.,"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *_BYTES, *_PIECES, *_LETTERS, "<|user|>"]
SPM_SCORES = [0.0] * 259 + [-float(n) for n in range(len(_PIECES) + len(_LETTERS))] + [-5000.0]
SPM_TYPES = [
    spm.UNKNOWN, spm.CONTROL, spm.CONTROL, *[spm.BYTE] * 256,
    *[spm.NORMAL] * (len(_PIECES) + len(_LETTERS)), spm.USER_DEFINED,
]  # fmt: skip
SPM_FACTS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": SPM_TOKENS,
    "tokenizer.ggml.scores": SPM_SCORES,
    "tokenizer.ggml.token_type": SPM_TYPES,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.padding_token_id": None,
    "tokenizer.ggml.add_bos_token": None,
    "llama.vocab_size": len(SPM_TOKENS),
}


def tiny_llama(**changes):
    """A random Llama whose vocabulary is :data:`TOKENS`."""
    return tiny_model("llama", **changes)


def tiny_model(architecture, **changes):
    """A random model of a family that GGUF files have, with the vocabulary :data:`TOKENS`."""
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 50_000.0,
        } | changes
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape) * 0.2 + (value.ndim == 1))
    return model


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _tensors(model, architecture):
    """The model's weights as llama.cpp names and orders them: a Llama's pairs beside each other."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.named_parameters():
        array = value.detach().numpy()
        module, kind = name.rsplit(".", 1)
        if module in _OUTER:
            yield f"{_OUTER[module]}.{kind}", array
            continue
        _, _, layer, module = module.split(".", 3)
        own = _NAMES[module]
        if own in heads and architecture == "llama":
            halves = array.reshape(heads[own], 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        yield f"blk.{layer}.{own}.{kind}", array


def write_gguf(path: Path, model, facts=(), tensors=(), quantized=(), architecture="llama"):
    """Writes the model; ``facts`` replace or add metadata, and ``None`` leaves one out.

    ``tensors`` are added by name; those whose name ends in one of ``quantized`` are held as Q8_0.
    """
    import gguf

    config = model.config
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50_000.0,
        "rope.dimension_count": config.head_dim,
        "vocab_size": len(TOKENS),
    }
    values = {f"{architecture}.{name}": value for name, value in own.items()}
    values |= {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **dict(facts),
    }
    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for name, value in values.items():
        if value is not None:
            adders[type(value)](name, value)
    for name, array in [*_tensors(model, architecture), *dict(tensors).items()]:
        if name.endswith(tuple(quantized)) and quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
