"""GGUF files, llama.cpp's format, turned into Hugging Face directories by transformers' reader.

What that reader leaves out or does in another way than llama.cpp is mended here, or refused: positions'
scaling, how text is split before its merges, which tokens come in front. Needs the extra ``gguf``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError
from flora_jax.files import whole_directory
from flora_jax.models.family import DTYPES, FAMILIES, read_family_config
from flora_jax.models.gguf_names import (
    BYTE_LEVEL,
    OTHER_FACTORS,
    ROTARY_FACTORS,
    ROTARY_NAMES,
    SENTENCEPIECE,
    SPLITS,
    Split,
    read_rotary,
)
from flora_jax.models.rotary import Rotary

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "torch", "transformers", "accelerate")
# What a file says of its model, under its architecture's name, and what the configuration calls it.
_FIELDS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
}
# Of a model with experts, or one that is not causal; 0 and False say that this is none.
_NO_EFFECT = ("expert_count", "expert_used_count", "pooling_type")


def is_gguf(source: str) -> bool:
    """Whether a model's source is a GGUF file, by its name or its first bytes."""
    path = Path(source)
    if path.suffix.lower() == SUFFIX:
        return not path.is_dir()
    return path.is_file() and _begins(path) == _MAGIC


def convert_gguf(file: str | Path, directory: str | Path, dtype: str | None = None) -> None:
    """Writes a GGUF file as a Hugging Face directory: config.json, safetensors, tokenizer, chat template.

    Weights are those that llama.cpp computes with: blocks are unpacked, nothing is trained or searched.

    Args:
        file: of one of the families that :data:`flora_jax.models.family.FAMILIES` lists.
        directory: is new or empty, and appears only when all is written.
        dtype: "float32", "bfloat16" or "float16". By default float32 where the file has blocks, which
            only that holds exactly, else the file's own.

    Raises:
        InputError: no GGUF file; packages of the extra are missing; another architecture, or something in
            the file that would be left out; too little room on the disk; ``directory`` is not empty.
    """
    path = Path(file)
    _check_file(path)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{file}: a GGUF needs {', '.join(missing)}: pip install 'flora-jax[gguf]'"
        )
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # What the package makes of damaged files is of many kinds.
        raise InputError(f"{file}: damaged: {_line(error)}") from None
    facts = {name: field.contents() for name, field in reader.fields.items()}
    types = {tensor.tensor_type.name for tensor in reader.tensors}
    wanted = dtype or _own_dtype(types)
    with whole_directory(directory) as part:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        weights = {name: int(t.n_elements) for name, t in tensors.items() if name != ROTARY_FACTORS}
        count = sum(weights.values())
        _check_room(part, count * (4 if wanted == "float32" else 2), directory)
        config = _config(path, facts, tensors)
        tokenizer = _tokenizer(path, facts, config)
        _write_model(path, config, wanted, part, count)
        tokenizer.save_pretrained(part)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    if (found := _begins(path)) != _MAGIC:
        raise InputError(f"{path}: no GGUF file: begins with {found!r}, expected {_MAGIC!r}")


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_MAGIC))


def _own_dtype(types: set[str]) -> str:
    """Of a file without blocks; its norms are float32 beside 16-bit weights."""
    if types <= {"F32", "BF16"} and "BF16" in types:
        return "bfloat16"
    if types <= {"F32", "F16"} and "F16" in types:
        return "float16"
    return "float32"


def _check_room(part: Path, needed: int, target: str | Path) -> None:
    free = shutil.disk_usage(part).free
    if free < needed:
        raise InputError(f"{target}: {needed:,} bytes are needed, {free:,} are free there")


def _config(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """transformers' configuration, mended and known to be one that the package can load."""
    from transformers import AutoConfig

    architecture = facts.get("general.architecture")
    if architecture not in FAMILIES:
        raise InputError(
            f"{path}: general.architecture is {architecture!r}, expected "
            f"{' or '.join(map(repr, sorted(FAMILIES)))}"
        )
    if facts.get("split.count", 1) > 1:
        raise InputError(
            f"{path}: is one of {facts['split.count']} parts, expected one file: gguf-split --merge"
        )
    own = {
        name.removeprefix(f"{architecture}."): value
        for name, value in facts.items()
        if name.startswith(f"{architecture}.")
    }
    own = {name: value for name, value in own.items() if name not in _NO_EFFECT or value}
    for name, value in own.items():
        if name not in (*_FIELDS, *ROTARY_NAMES, "attention.value_length"):
            raise InputError(f"{path}: {architecture}.{name} is {value!r}, which is not known here")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: transformers cannot read it: {_line(error)}") from None
    if "attention.sliding_window" not in own and getattr(config, "sliding_window", None):
        config.sliding_window = None  # A default of the class, of which the file says nothing.
    own.setdefault("vocab_size", len(facts.get("tokenizer.ggml.tokens", ())) or config.vocab_size)
    for name, field in _FIELDS.items():
        if name in own and getattr(config, field, None) != own[name]:
            setattr(config, field, own[name])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head) != head:
            raise InputError(
                f"{path}: {architecture}.{name} is {own[name]}, expected a head's width, {head}"
            )
    config.rope_parameters = _rotary(path, own, tensors, head).to_dict()["rope_parameters"]
    config.eos_token_id = _end_tokens(facts)
    read_family_config(_written(config), f"{path}: as config.json")
    return config


def _end_tokens(facts: Mapping[str, Any]) -> Any:
    """The ids that end a document and a turn: one, a list, or ``None``."""
    named = [facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = list(dict.fromkeys(int(one) for one in named if one is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _rotary(path: Path, own: Mapping[str, Any], tensors: Mapping[str, Any], dim: int) -> Rotary:
    """The positions' settings, of which transformers' reader takes the base at most."""
    if other := [name for name in tensors if name.startswith(OTHER_FACTORS)]:
        raise InputError(f"{path}: has the tensor {other[0]}, which is not known here")
    factors = tensors.get(ROTARY_FACTORS)
    try:
        return read_rotary(own, None if factors is None else factors.data, dim)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _written(config: Any) -> dict[str, Any]:
    """config.json: without what transformers' reader leaves in it of the GGUF."""
    raw: dict[str, Any] = config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
        raw.pop(name, None)
    return raw


def _write_model(path: Path, config: Any, dtype: str, part: Path, count: int) -> None:
    """Writes config.json and the weights, which have to be ``count`` numbers: all of the file's."""
    import torch
    import transformers
    from huggingface_hub import save_torch_state_dict

    # Newer readers would hold some blocks as they are.
    unpacked = getattr(transformers, "GgufConfig", None)
    options = {} if unpacked is None else {"quantization_config": unpacked(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=getattr(torch, dtype), **options
    )
    state = model.state_dict()
    if config.tie_word_embeddings:
        # One storage under two names: the file has it once.
        seen: dict[int, str] = {}
        for name, tensor in state.items():
            seen.setdefault(tensor.data_ptr(), name)
        state = {name: state[name] for name in seen.values()}
    if (found := sum(tensor.numel() for tensor in state.values())) != count:
        raise InputError(
            f"{path}: its tensors have {count:,} numbers, transformers' model {found:,}: some would be "
            "left out"
        )
    raw = _written(config) | {"architectures": [type(model).__name__], "dtype": dtype}
    (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_torch_state_dict(state, part)
    for file in part.glob("*.safetensors"):  # Made for its owner alone.
        shutil.copymode(part / "config.json", file)
    ends = {"eos_token_id": config.eos_token_id, "bos_token_id": config.bos_token_id}
    text = json.dumps({name: ids for name, ids in ends.items() if ids is not None}, indent=2)
    (part / "generation_config.json").write_text(text + "\n")


def _tokenizer(path: Path, facts: Mapping[str, Any], config: Any) -> Any:
    """transformers' tokenizer of the file, with llama.cpp's ids."""
    from transformers import PreTrainedTokenizerFast

    kind = facts.get("tokenizer.ggml.model")
    if kind not in _TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer.ggml.model is {kind!r}, expected {' or '.join(map(repr, _TOKENIZERS))}"
        )
    tokens = facts["tokenizer.ggml.tokens"]
    read = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    backend = read.backend_tokenizer
    _TOKENIZERS[kind](path, facts, backend)
    # Whether a tokenizer adds these is no part of the vocabulary; the defaults are llama.cpp's.
    before = facts.get("tokenizer.ggml.add_bos_token", _adds_bos(facts))
    ends = (("bos", before), ("eos", facts.get("tokenizer.ggml.add_eos_token", False)))
    ids = {name: facts[f"tokenizer.ggml.{name}_token_id"] for name, added in ends if added}
    _add_ends(backend, {name: (tokens[number], int(number)) for name, number in ids.items()})
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in names.items()
        if facts.get(f"tokenizer.ggml.{theirs}_token_id") is not None
    }
    # A class of its own would split the text anew in its own way when it is loaded.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokens):
        raise InputError(f"{path}: the tokenizer has id {highest}, the file {len(tokens)} tokens")
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    return tokenizer


def _adds_bos(facts: Mapping[str, Any]) -> bool:
    split = SPLITS.get(facts.get("tokenizer.ggml.pre", ""), Split())
    return facts["tokenizer.ggml.model"] == SENTENCEPIECE or split.whole


def _mend_byte_level(path: Path, facts: Mapping[str, Any], backend: Any) -> None:
    """How a byte-level tokenizer splits text before its merges."""
    from tokenizers import pre_tokenizers

    pre: Any = facts.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise InputError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(SPLITS)}"
        )
    split = SPLITS[pre]
    if not split.own:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        both = pre_tokenizers.Sequence([digits, bytes_])
        backend.pre_tokenizer = both if split.digits_apart else bytes_
    elif "Split" not in str(backend.pre_tokenizer):
        raise InputError(f"{path}: this transformers does not know tokenizer.ggml.pre {pre!r}")
    if split.whole:
        model = backend.model
        model.ignore_merges = True
        backend.model = model


def _mend_sentencepiece(path: Path, facts: Mapping[str, Any], backend: Any) -> None:
    if not facts.get("tokenizer.ggml.add_space_prefix", True):
        raise InputError(
            f"{path}: tokenizer.ggml.add_space_prefix is false, which is known for byte-level tokenizers"
        )


# By ``tokenizer.ggml.model``.
_TOKENIZERS: dict[str, Callable[[Path, Mapping[str, Any], Any], None]] = {
    BYTE_LEVEL: _mend_byte_level,
    SENTENCEPIECE: _mend_sentencepiece,
}


def _add_ends(backend: Any, ends: Mapping[str, tuple[str, int]]) -> None:
    """Has a tokenizer add these tokens to every text, and no others."""
    from tokenizers import processors

    if backend.encode("").ids == [number for _, number in ends.values()]:
        return
    single = ["$A"]
    single = [f"{ends['bos'][0]}:0", *single] if "bos" in ends else single
    single = [*single, f"{ends['eos'][0]}:0"] if "eos" in ends else single
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=[*ends.values()]
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
