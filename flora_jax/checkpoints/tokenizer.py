"""The tokenizer that lies beside a checkpoint, if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flora_jax.errors import InputError


def load_tokenizer(directory: Path, vocab_size: int) -> Any | None:
    """The ``tokenizers.Tokenizer`` of ``tokenizer.json``, or ``None`` where there is no such file.

    Raises:
        InputError: the file is damaged, or has ids that the model has no embedding for.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The binding raises bare Exception.
        raise InputError(f"{path}: not a tokenizer: {error}") from None
    # Settings for training batches; they would change a prompt without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise InputError(f"{path}: has token id {highest}, the model's vocabulary is {vocab_size}")
    return tokenizer


def tokens_in_front(tokenizer: Any) -> list[int]:
    """The ids that a ``tokenizers.Tokenizer`` puts in front of a text, such as a first token."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    # What is added belongs to no text.
    own = [place for place, text in enumerate(encoding.sequence_ids) if text is not None]
    return encoding.ids[: own[0]] if own else []
