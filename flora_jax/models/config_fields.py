"""Reading and writing config.json: what the families do alike with its fields.

A family says in a :class:`Fields` what its file may have; a field that it does not name, or a value of
another type, is an error. Knows nothing of arrays, or of what a field means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flora_jax.errors import InputError
from flora_jax.models.family import DTYPES, ModelConfig

# By the names that config.json has; flora_jax.models.layers has their functions.
ACTIVATIONS = (
    "gelu_pytorch_tanh",
    "gelu_new",
    "gelu_fast",
    "gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)
# Sizes beyond any model that there is: a configuration with larger ones is damaged, and building it
# would take the machine's memory before anything else could be wrong.
LARGEST: Mapping[str, int] = {
    "layers": 1024,
    "heads": 4096,
    "width": 1 << 18,
    "positions": 1 << 26,
    "vocabulary": 1 << 24,
}
# Written by transformers, or by Unsloth, into the config.json of any model, without effect on the logits
# of a forward pass: special tokens, defaults of generation, fields of training and of other tasks.
_WITHOUT_EFFECT = frozenset(
    "architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label initializer_range is_encoder_decoder label2id "
    "length_penalty loss_type max_length min_length model_name model_type no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values "
    "repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torchscript transformers_version typical_p unk_token_id unsloth_fixed unsloth_version "
    "use_bfloat16 use_cache".split()
)
# Of these what others read.
_KEPT = ("bos_token_id", "pad_token_id")
# Accepted at the one value that a decoder here computes, and where they are null.
_ONLY = {
    "add_cross_attention": False,
    "hidden_dropout": 0.0,
    "is_decoder": False,
    "quantization_config": None,
}
# Read by rules of their own, not by their names.
_OWN_RULES = ("eos_token_id", "dtype", "torch_dtype")
_TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a family's config.json may have, beside the fields of its configuration and what all have.

    Args:
        model_types: that the family reads.
        types: of fields that are no fields of the configuration or have another type there, as an
            annotation has it: "int | None", "dict | None", "list". The family takes them out of what
            :func:`read_fields` returns, or sets them right.
        aliases: other names of fields.
        only: fields that are accepted at the one value that the family computes, or null.
        without_effect: names of further fields without effect on the logits of a forward pass.
        kept: those of them that are written again, because others read them: dropout while they train.
        derived: names of the configuration's fields that no file has: the family sets them from others.
    """

    model_types: tuple[str, ...]
    types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    kept: tuple[str, ...] = ()
    derived: frozenset[str] = frozenset()


def read_fields(
    config: type[Any], fields: Fields, raw: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The values of config.json's object for the fields of a configuration, their types checked.

    Among them are ``eos_token_ids`` (where the file has an ``eos_token_id``), ``dtype`` and ``others``.

    Args:
        config: the family's class, a dataclass; what its annotations say are the fields' types.
        fields: what else the file may have.
        raw: config.json's object.
        where: the file, for messages.

    Raises:
        InputError: another family, an unknown field, two names of one field with two values, a type
            or a value that is not supported; the message starts with ``where``.
    """
    if raw.get("model_type") not in fields.model_types:
        expected = " or ".join(map(repr, fields.model_types))
        raise InputError(f"{where}: model_type is {raw.get('model_type')!r}, expected {expected}")
    special = fields.derived.union(("eos_token_ids", "dtype", "others"))
    types = {f.name: str(f.type) for f in dataclasses.fields(config) if f.name not in special}
    types.update(fields.types)
    only = {**_ONLY, **fields.only}
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in raw.items():
        name = fields.aliases.get(key, key)
        if name != key and raw.get(name, value) != value:
            raise InputError(f"{where}: {key} is {value!r}, but {name} is {raw[name]!r}")
        if name in types:
            _check_type(where, name, value, types[name])
            values[name] = value
        elif key in only and value is not None:
            if value != only[key]:
                raise InputError(f"{where}: {key} is {value!r}, only {only[key]!r} is supported")
        elif key not in _OWN_RULES and not _is_without_effect(key, fields) and value is not None:
            unknown.append(f"{key}={value!r}")
    if unknown:
        raise InputError(f"{where}: fields of unknown effect: {', '.join(sorted(unknown))}")
    if "eos_token_id" in raw:
        eos = raw["eos_token_id"]
        values["eos_token_ids"] = (
            tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None)
        )
    values["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    values["others"] = tuple((n, raw[n]) for n in (*fields.kept, *_KEPT) if n in raw)
    return values


def _is_without_effect(key: str, fields: Fields) -> bool:
    return key in _WITHOUT_EFFECT or key in fields.without_effect or key.startswith("_")


def _check_type(where: str, name: str, value: Any, annotation: str) -> None:
    expected = [kind.strip() for kind in annotation.split("|")]
    fits = isinstance(value, tuple(t for kind in expected for t in _TYPES[kind]))
    # A bool is an int to Python.
    if not fits or (isinstance(value, bool) and "bool" not in expected):
        raise InputError(f"{where}: {name} is {value!r}, expected {annotation}")


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Puts ``where`` before the message of an ``InputError`` from within."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def write_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The configuration as config.json has it: every field by its name, and what was kept.

    Args:
        config: a dataclass.
        architecture: the name of transformers' class.
    """
    raw = dataclasses.asdict(config)  # type: ignore[call-overload]
    eos = raw.pop("eos_token_ids")
    first = eos[0] if eos else None
    del raw["others"]
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        **raw,
        "bos_token_id": first,
        "eos_token_id": list(eos) if len(eos) > 1 else first,
        **dict(config.others),
    }


def check_fields(config: ModelConfig, sizes: Mapping[str, str]) -> None:
    """Raises ``InputError`` unless sizes, end tokens and dtype are such as a model may have.

    Args:
        config: of any family.
        sizes: by field what it is a size of, a key of :data:`LARGEST`.
    """
    for name, kind in sizes.items():
        check_size(name, getattr(config, name), kind)
    for token in config.eos_token_ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise InputError(f"config: eos_token_id is {token!r}, expected token ids")
    if config.dtype not in DTYPES:
        raise InputError(
            f"config: dtype is {config.dtype!r}, expected float32, bfloat16 or float16"
        )


def check_size(name: str, value: Any, kind: str) -> None:
    """Raises ``InputError`` unless ``value`` is a positive integer that a model may have.

    Args:
        name: of the field.
        value: found in a configuration.
        kind: of :data:`LARGEST`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config: {name} is {value!r}, expected a positive integer")
    if value > LARGEST[kind]:
        raise InputError(f"config: {name} is {value}, expected at most {LARGEST[kind]}")


def check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Raises ``InputError`` unless the field ``name`` is a multiple of the field ``of``."""
    if value % divisor:
        raise InputError(f"config: {name} {value} is not a multiple of {of} {divisor}")


def check_positive(name: str, value: float) -> None:
    """Raises ``InputError`` unless a number is above 0 and finite."""
    if not 0 < value < math.inf:
        raise InputError(f"config: {name} is {value}, expected above 0")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ``InputError`` unless a value is one of ``choices``."""
    if value not in choices:
        raise InputError(
            f"config: {name} is {value!r}, expected one of {', '.join(map(str, choices))}"
        )
