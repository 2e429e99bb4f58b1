"""Where a checkpoint comes from: directories and hub ids.

Knows nothing of tensors.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from flora_jax.checkpoints.tensor_files import CheckpointError

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local directory of a checkpoint: ``source`` itself, or a hub id's files, downloaded.

    From the hub come config.json, the tokenizer's files and, if ``weights``, safetensors (or, where
    there are none, pytorch_model.bin).

    Raises:
        CheckpointError: neither a directory nor a hub id that can be fetched, or no checkpoint there.
    """
    text, directory = os.fspath(source), Path(source)
    if not directory.exists():
        if not _HUB_ID.fullmatch(text):
            raise CheckpointError(
                f"{text}: no such file or directory, and not a Hugging Face id (owner/name)"
            )
        directory = _fetch(text, weights)
    elif not directory.is_dir():
        raise CheckpointError(f"{text}: is a file, expected a directory with config.json")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{text}: not a checkpoint: no config.json in it")
    return directory


def _fetch(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *COMPANIONS, *(_WEIGHTS if weights else ())]
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=patterns))
        if weights and not any(directory.glob(_WEIGHTS[0])):
            snapshot_download(hub_id, allow_patterns=list(_TORCH_WEIGHTS))
    except Exception as error:  # The hub's client raises errors of many libraries.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise CheckpointError(
            f"{hub_id}: no such file or directory, and the Hugging Face hub gives no model of that "
            f"id: {type(error).__name__}: {reason.strip()}"
        ) from None
    return directory


def copy_companions(source: str | os.PathLike[str] | None, target: Path) -> None:
    """Copies the tokenizer's and generation's files that ``source`` has."""
    for name in COMPANIONS if source is not None else ():
        assert source is not None
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
