"""GGUF files, llama.cpp's format, turned into Hugging Face directories.

What a file says is honoured as llama.cpp does, or refused. Its tokenizer is read and mended in
:mod:`flora_jax.checkpoints.gguf_tokenizer`. Needs the extra ``gguf``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import reprlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.checkpoints.gguf_tokenizer import check_tokens, read_tokenizer
from flora_jax.checkpoints.tensor_files import FLOATS, Entry, write_shards
from flora_jax.errors import InputError, one_line
from flora_jax.files import whole_directory
from flora_jax.models.family import DTYPES, FAMILIES, ModelConfig, family_of, read_family_config
from flora_jax.models.gguf_names import (
    INTERLEAVED,
    OTHER_FACTORS,
    OUTPUT,
    ROTARY_FACTORS,
    ROTARY_NAMES,
    read_rotary,
)
from flora_jax.models.rotary import Rotary

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "torch", "transformers")
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
# May be missing: llama.cpp has a value for them.
_OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.sliding_window",
    "vocab_size",
)
# No sizes but real numbers, and what is no number.
_REALS = (
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
)
_OTHERS = ("rope.scaling.finetuned", "rope.scaling.type")
# May be given for each layer.
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
# 0 and False say that the model has none: of experts, of a pooling, of a window.
_NO_EFFECT = ("expert_count", "expert_used_count", "pooling_type", "attention.sliding_window")
_TEXTS = (
    "general.architecture",
    "tokenizer.chat_template",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
)


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
    facts, tensors = _read(path)
    wanted = dtype or _own_dtype({tensor.tensor_type.name for tensor in tensors.values()})
    with whole_directory(directory) as part:
        architecture = _architecture(path, facts)
        check_tokens(path, facts)
        raw = _config(path, facts, tensors, architecture) | {"dtype": wanted}
        config = read_family_config(raw, f"{path}: as config.json")
        raw["architectures"] = config.to_dict()["architectures"]
        entries = _entries(path, tensors, config, architecture)
        _check_room(part, sum(entry.nbytes for entry in entries), directory)
        tokenizer = read_tokenizer(path, facts, config.n_positions)
        _write_configs(part, raw)
        write_shards(part, entries)
        tokenizer.save_pretrained(part)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    if (found := _begins(path)) != _MAGIC:
        raise InputError(f"{path}: no GGUF file: begins with {found!r}, expected {_MAGIC!r}")


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_MAGIC))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's metadata and its tensors, by name."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # What the package makes of damaged files is of many kinds.
        raise InputError(f"{path}: damaged: {one_line(error)}") from None
    for name in _TEXTS:
        if not isinstance(facts.get(name, ""), str):
            raise InputError(f"{path}: {name} is {reprlib.repr(facts[name])}, expected a text")
    return facts, {tensor.name: tensor for tensor in reader.tensors}


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


def _architecture(path: Path, facts: Mapping[str, Any]) -> str:
    """The file's architecture, of a family that is known here, in one file."""
    import gguf

    architecture = facts.get("general.architecture")
    known = FAMILIES.keys() & gguf.MODEL_ARCH_NAMES.values()
    if architecture not in known:
        raise InputError(
            f"{path}: general.architecture is {architecture!r}, expected "
            f"{' or '.join(map(repr, sorted(known)))}"
        )
    if facts.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{path}: is one of {facts['split.count']} parts, expected one file: gguf-split --merge"
        )
    return architecture


def _config(
    path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Any], architecture: str
) -> dict[str, Any]:
    """config.json, with the defaults of transformers where a file can say nothing."""
    from transformers import AutoConfig

    own = _own_facts(path, facts, architecture)
    # Some classes warn of their own defaults of these.
    known = AutoConfig.for_model(architecture, bos_token_id=None, eos_token_id=None)
    for name, field in _FIELDS.items():
        if name not in own and name not in _OPTIONAL and hasattr(known, field):
            raise InputError(f"{path}: {architecture}.{name} is missing, expected a number above 0")
    heads, width = own["attention.head_count"], own["embedding_length"]
    if "attention.key_length" not in own and width % heads:
        raise InputError(
            f"{path}: {architecture}.embedding_length is {width}, expected a multiple of "
            f"{architecture}.attention.head_count, {heads}"
        )
    head = own.get("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head) != head:
            raise InputError(
                f"{path}: {architecture}.{name} is {own[name]}, expected a head's width, {head}"
            )
    # What llama.cpp takes where a file says nothing; classes have other defaults.
    usual = {
        "attention.head_count_kv": heads,
        "attention.key_length": head,
        "attention.sliding_window": None,
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
    }
    usual = {name: value for name, value in usual.items() if hasattr(known, _FIELDS[name])}
    fields = {_FIELDS[name]: value for name, value in (usual | own).items() if name in _FIELDS}
    fields |= _rotary(path, own, tensors, head).to_dict()
    fields["tie_word_embeddings"] = OUTPUT not in tensors
    fields["eos_token_id"] = _end_tokens(facts)
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        fields[f"{ours}_token_id"] = facts.get(f"tokenizer.ggml.{theirs}_token_id")
    try:
        raw: dict[str, Any] = AutoConfig.for_model(architecture, **fields).to_dict()
    except Exception as error:  # Its classes check their fields, each in its way.
        raise InputError(f"{path}: transformers refuses its settings: {one_line(error)}") from None
    raw.pop("_name_or_path", None)
    return raw


def _own_facts(path: Path, facts: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """What a file says of its model, without the architecture's name: known, and of the right kind."""
    start = f"{architecture}."
    own = {name.removeprefix(start): v for name, v in facts.items() if name.startswith(start)}
    own = {name: value for name, value in own.items() if name not in _NO_EFFECT or value}
    for name, value in own.items():
        said = f"{path}: {architecture}.{name} is {reprlib.repr(value)}"
        if name not in (*_FIELDS, *ROTARY_NAMES, "attention.value_length"):
            raise InputError(f"{said}, which is not known here")
        if name in _PER_LAYER and isinstance(value, list):
            if len({*value}) != 1 or len(value) != own.get("block_count"):
                raise InputError(
                    f"{said}, expected the same number for each of {own.get('block_count')} layers"
                )
            value = own[name] = value[0]
        kinds = (int, float) if name in _REALS else (int,)
        right = isinstance(value, kinds) and not isinstance(value, bool)
        if name not in _OTHERS and not (right and (name in _REALS or value > 0)):
            raise InputError(f"{said}, expected a number{'' if name in _REALS else ' above 0'}")
    return own | {name: float(own[name]) for name in _REALS if name in own}


def _end_tokens(facts: Mapping[str, Any]) -> Any:
    """The ids that end a document and a turn: one, a list, or ``None``."""
    named = [facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = list(dict.fromkeys(int(one) for one in named if one is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _rotary(path: Path, own: Mapping[str, Any], tensors: Mapping[str, Any], dim: int) -> Rotary:
    """The positions' settings, in errors with the file's name."""
    if other := [name for name in tensors if name.startswith(OTHER_FACTORS)]:
        raise InputError(f"{path}: has the tensor {other[0]}, which is not known here")
    factors = tensors.get(ROTARY_FACTORS)
    try:
        return read_rotary(own, None if factors is None else factors.data, dim)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _entries(
    path: Path, tensors: Mapping[str, Any], config: ModelConfig, architecture: str
) -> list[Entry]:
    """Every parameter as config.json's model has it, to be unpacked when it is written.

    Raises:
        InputError: the file lacks one, has it in another shape, or holds something else.
    """
    import gguf

    dtype = next(one for one in FLOATS if one.name == config.dtype)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.n_layer)
    heads = (
        {"attn_q": config.n_head, "attn_k": config.kv_heads} if architecture in INTERLEAVED else {}
    )
    entries, used = [], {ROTARY_FACTORS}
    for parameter in family_of(config).tensors(config).values():
        module, _, kind = parameter.name.rpartition(".")
        name = f"{names.get_name(module)}.{kind}"
        if name not in tensors:
            raise InputError(f"{path}: has no tensor {name}, expected for {parameter.name}")
        shape = tuple(map(int, reversed(tensors[name].shape)))
        if shape != parameter.shape:
            raise InputError(
                f"{path}: {name} has shape {shape}, expected {parameter.shape} by the file's metadata"
            )
        used.add(name)
        array = _Unpacked(path, tensors[name], heads.get(name.split(".")[-2], 0), dtype)
        entries.append(Entry(parameter.name, shape, dtype, array))
    if more := [name for name in tensors if name not in used]:
        raise InputError(f"{path}: has the tensor {more[0]}, which is not known here")
    return entries


@dataclasses.dataclass(frozen=True)
class _Unpacked:
    """A tensor's numbers, out of their blocks; of ``heads`` whose halves are interleaved, unless 0."""

    path: Path
    tensor: Any
    heads: int
    dtype: np.dtype

    def __call__(self) -> np.ndarray:
        import gguf

        try:
            array = gguf.dequantize(self.tensor.data, self.tensor.tensor_type)
        except Exception as error:  # Of a type that the package only knows by name, or damaged.
            raise InputError(
                f"{self.path}: {self.tensor.name} cannot be unpacked: {one_line(error)}"
            ) from None
        if self.heads:
            pairs = array.reshape(self.heads, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        with np.errstate(over="ignore"):
            cast = array.astype(self.dtype, copy=False)
        if cast.dtype != array.dtype and np.isinf(cast).any() and not np.isinf(array).any():
            raise InputError(
                f"{self.path}: {self.tensor.name} has values up to {np.abs(array).max():.4g}, too large "
                f"for {self.dtype}"
            )
        return cast


def _write_configs(part: Path, raw: Mapping[str, Any]) -> None:
    (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    ends = {name: raw.get(name) for name in ("eos_token_id", "bos_token_id")}
    text = json.dumps({name: ids for name, ids in ends.items() if ids is not None}, indent=2)
    (part / "generation_config.json").write_text(text + "\n")
