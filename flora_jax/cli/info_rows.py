"""What a checkpoint or an adapter folder is, as rows of text for ``flora-jax info``."""

from __future__ import annotations

from collections.abc import Iterator

from flora_jax.shipped import adapter_source

Row = tuple[str, str]
_UNKNOWN = "not known before the weights are fetched: config.json names no dtype"
# As safetensors and as the rest of the program name them.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def describe_rows(path: str) -> Iterator[Row]:
    """Name and value of each fact about a model or, where adapter_config.json is, an adapter. Both may be
    shipped ones; an existing path wins.

    Raises:
        ValueError: it is neither, or damaged.
    """
    folder = adapter_source(path)
    if (folder / "adapter_config.json").exists():
        yield from _adapter_rows(str(folder))
    else:
        yield from _model_rows(path)


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
