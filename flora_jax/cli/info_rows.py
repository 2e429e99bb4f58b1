"""What a checkpoint or an adapter folder is, as rows of text for ``flora-jax info``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flora_jax.errors import InputError
from flora_jax.shipped import adapter_source, near_adapters

Row = tuple[str, str]
_UNKNOWN = "not known before the weights are fetched: config.json names no dtype"
# As safetensors and as the rest of the program name them.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def describe_rows(path: str) -> Iterator[Row]:
    """Name and value of each fact about a model, an adapter's folder, or a run of ``flora-jax train``.
    Models and adapters may be shipped ones; an existing path wins.

    Raises:
        ValueError: it is none of them, or damaged.
    """
    from flora_jax.peft.no_adapter import adapters_in, is_run, no_adapter

    folder = adapter_source(path)
    if (folder / "adapter_config.json").exists():
        yield from _adapter_rows(str(folder))
    elif is_run(folder):
        yield from _run_rows(folder)
    elif (
        folder.is_dir()
        and not (folder / "config.json").exists()
        and (any(folder.glob("adapter_model.*")) or adapters_in(folder))
    ):
        raise InputError(no_adapter(path))
    else:
        try:
            yield from _model_rows(path)
        except InputError as error:
            if folder.exists() or folder.is_absolute() or not near_adapters(path):
                raise
            # Who misspells a shipped adapter is not helped by what the hub says alone.
            reason = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{no_adapter(path)}; as a model: {reason}") from None


def _model_rows(path: str) -> Iterator[Row]:
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.models.cache import cache_bytes_per_token
    from flora_jax.models.family import family_of

    opened = open_checkpoint(path)
    found, config = opened.describe(), opened.config
    yield "model", f"{family_of(config).title}, {found.format}"
    yield "parameters", f"{found.parameters:,}"
    known = found.bytes is not None
    yield "bytes", f"{found.bytes:,} as {config.dtype}" if known else _UNKNOWN
    yield "layers", config.summary()
    yield "context", f"{config.n_positions:,} positions"
    yield "vocabulary", f"{config.vocab_size:,}"
    cache = cache_bytes_per_token(config, config.dtype)
    yield "cache", f"{cache:,} bytes a token" + ("" if known else f" as {config.dtype}")
    tokenizer = opened.tokenizer
    yield "tokenizer", "none" if tokenizer is None else f"{tokenizer.get_vocab_size():,} pieces"
    yield "chat template", opened.chat.where if opened.chat.template is not None else "none"
    for target, (inputs, outputs) in config.projections().items():
        yield f"target {target}", f"{inputs:,} -> {outputs:,}"


def _run_rows(folder: Path) -> Iterator[Row]:
    from flora_jax.peft.no_adapter import adapters_in
    from flora_jax.peft.read import describe_adapter

    config = folder / "config.json"
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
        yield "run", f"flora-jax train: {raw['kind']} on {raw['model']}"
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(f"{config}: not the options of a training run") from None
    adapters = adapters_in(folder)
    for own in adapters:
        yield "adapter", f"{own}: {describe_adapter(own).parameters:,} parameters"
    if not adapters:
        yield "adapters", "none yet: they are written at the end"


def _adapter_rows(path: str) -> Iterator[Row]:
    from flora_jax.peft.read import describe_adapter

    found = describe_adapter(path)
    yield "adapter", found.kind + (f", reduction {found.reduction}" if found.reduction else "")
    yield "base", found.base_model_name_or_path or "not named"
    yield "parameters", f"{found.parameters:,}"
    yield "bytes", f"{found.bytes:,} as {', '.join(_DTYPES[name] for name in found.dtypes)}"
    yield "layers", ", ".join(map(str, found.layers))
    for target in found.targets:
        ranks = ", ".join(map(str, found.ranks[target]))
        inputs, outputs = ("?" if side is None else f"{side:,}" for side in found.widths[target])
        yield f"target {target}", f"rank {ranks}, {inputs} -> {outputs}"
    for name in found.unused:
        yield f"target {name}", "named by target_modules, without a tensor"
