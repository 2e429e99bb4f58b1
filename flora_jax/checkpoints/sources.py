"""Where a checkpoint comes from: directories and hub ids.

Knows nothing of tensors.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from flora_jax.checkpoints.tensor_files import CheckpointError, unreadable
from flora_jax.shipped import model_source

# What a user expects to find beside the weights, copied along unread.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_TORCH_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# How long the hub may take to say whether it has a model.
_HUB_SECONDS = 10
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local directory of a checkpoint: ``source`` itself, a shipped model's, or a hub id's files,
    downloaded.

    From the hub come config.json, the tokenizer's files and, if ``weights``, safetensors (or, where
    there are none, pytorch_model.bin).

    Raises:
        CheckpointError: neither a directory nor a hub id that can be fetched, or no checkpoint there.
    """
    text = model_source(os.fspath(source))
    directory = Path(text)
    if not text.strip():
        raise CheckpointError(
            f"the model is {text!r}, expected a directory or a Hugging Face id (owner/name)"
        )
    try:
        return _resolve(text, directory, weights)
    except OSError as error:  # A name that is too long, a directory that may not be entered.
        raise unreadable(directory, error) from None


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether a source that was resolved is a hub id: no directory and no shipped model."""
    return not Path(model_source(os.fspath(source))).exists()


def _resolve(text: str, directory: Path, weights: bool) -> Path:
    if not directory.exists():
        if not _HUB_ID.fullmatch(text):
            raise CheckpointError(
                f"{text}: no such file or directory, and not a Hugging Face id (owner/name)"
            )
        directory = _fetch(text, weights)
    elif not directory.is_dir():
        hint = (
            f"; flora-jax convert {text} DIR --to hf makes one"
            if directory.suffix == ".gguf"
            else " (flora-jax convert takes a .gguf file too)"
        )
        raise CheckpointError(f"{text}: is a file, expected a directory with config.json{hint}")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{text}: not a checkpoint: no config.json in it")
    return directory


def _fetch(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    local = constants.HF_HUB_OFFLINE
    unreachable = "HF_HUB_OFFLINE is set" if local else ""
    try:
        # Asked once and for a bounded time: snapshot_download tries for half a minute.
        if not local:
            HfApi().model_info(hub_id, timeout=_HUB_SECONDS)
    except Exception as error:  # The hub's client raises errors of many libraries.
        if hasattr(error, "response"):  # The hub's own answer.
            raise CheckpointError(
                f"{hub_id}: no such file or directory, and the Hugging Face hub gives no model of "
                f"that id: {type(error).__name__}: {_first_line(error)}"
            ) from None
        local, unreachable = True, f"{type(error).__name__}: {_first_line(error)}"
    patterns = ["config.json", *COMPANIONS, *(_WEIGHTS if weights else ())]
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=local))
        if weights and not any(directory.glob(_WEIGHTS[0])):
            snapshot_download(hub_id, allow_patterns=list(_TORCH_WEIGHTS), local_files_only=local)
    except Exception as error:
        reason = unreachable or f"{type(error).__name__}: {_first_line(error)}"
        problem = "and the Hugging Face hub cannot be reached" if local else "the download failed"
        raise CheckpointError(f"{hub_id}: no such file or directory, {problem}: {reason}") from None
    return directory


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def copy_companions(source: str | os.PathLike[str] | None, target: Path) -> None:
    """Copies the tokenizer's and generation's files that ``source`` has."""
    for name in COMPANIONS if source is not None else ():
        assert source is not None
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
