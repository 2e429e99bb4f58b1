"""Documents → packed tokens, once: the result is kept in a cache named by all that decides it.

Knows nothing of batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.checkpoints.token_bytes import TokenBytes
from flora_jax.checkpoints.tokenizer import tokens_in_front
from flora_jax.errors import InputError
from flora_jax.files import whole_path
from flora_jax.terminal import progress, say
from flora_jax.train.data.documents import Document, content_digest, read_documents
from flora_jax.train.data.packing import PackedTokens

# Part of a cache file's name: to be raised when the same input would give another file.
FORMAT = 1
# Documents and bytes encoded at once: enough to keep the tokenizer's threads busy.
BATCH = 256
BATCH_BYTES = 4_000_000

Progress = Callable[[int, int], None]


def tokenize(
    source: str | Path,
    tokenizer: Any,
    end_id: int,
    *,
    column: str | None = None,
    cache: Path | None = None,
    leave_out: Collection[Path] = (),
    watch: Progress | None = None,
    max_corrupt: float = 0.01,
) -> tuple[PackedTokens, list[str]]:
    """The documents of ``source`` (see :func:`.documents.read_documents`) as packed tokens, and the
    places and reasons of what was skipped.

    ``tokenizer`` is a ``tokenizers.Tokenizer``; each document begins with what it puts in front of a
    text, as a prompt does, and is closed by ``end_id``. ``cache`` is a directory (``None``: nothing is
    kept) for a file whose name is a hash of the data's content, the tokenizer, ``end_id``, ``column``
    and ``max_corrupt``; a damaged one is made anew, and one that cannot be written is a line on
    standard error. A hub data set is kept by its revision, where the hub tells it. Neither ``cache``
    nor ``leave_out`` is read where they lie in a directory of source files. ``watch(documents, bytes)``
    is called with what is tokenised so far; not at all where the cache has it.

    Raises:
        InputError: see :func:`.documents.read_documents`; or the tokenizer is set to cut or pad.
    """
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise InputError("the tokenizer is set to cut or to pad, which would spoil documents")
    kept = None
    if cache is not None:
        leave_out = [*leave_out, cache]
    if cache is not None and (digest := content_digest(source, leave_out=leave_out)) is not None:
        parts = [FORMAT, digest, tokenizer.to_str(), end_id, column, max_corrupt]
        # Without one the name is what it was when documents began with their text.
        parts += ["first", *first] if (first := tokens_in_front(tokenizer)) else []
        kept = Path(cache) / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npz"
        if (found := _load_whole(kept)) is not None:
            return found
    skipped: list[str] = []
    documents = read_documents(
        source, column=column, max_corrupt=max_corrupt, corrupt=skipped, leave_out=leave_out
    )
    packed = pack(documents, tokenizer, end_id, watch)
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_packed(kept, packed, skipped)
        except OSError as error:  # It is never worth the work that is done.
            cause = error.strerror or error
            say(f"warning: {kept} is not written ({cause}); the next run tokenises again")
    return packed, skipped


def pack(
    documents: Iterable[Document], tokenizer: Any, end_id: int, watch: Progress | None = None
) -> PackedTokens:
    """The documents' tokens end to end, each with what the tokenizer puts in front of a text and closed
    by ``end_id``; uint16 where all ids fit.
    """
    first = tokens_in_front(tokenizer)
    highest = max([end_id, *tokenizer.get_vocab().values()])
    dtype = np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32
    pieces: list[np.ndarray] = [np.zeros(0, dtype)]
    names: list[str] = []
    text_bytes = 0
    for texts in _batches(documents):
        encodings = tokenizer.encode_batch([d.text for d in texts], add_special_tokens=False)
        pieces += [np.array([*first, *encoding.ids, end_id], dtype) for encoding in encodings]
        names += [document.name for document in texts]
        text_bytes += sum(len(document.text.encode()) for document in texts)
        if watch is not None:
            watch(len(names), text_bytes)
    # The empty first piece makes every sum of lengths before a document one of the list.
    starts = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)[:-1]
    return PackedTokens(np.concatenate(pieces), starts, tuple(names), text_bytes)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def tokenizing() -> Iterator[Progress]:
    """A line on the terminal with how much of a source is tokenised, gone at the end."""
    with progress("reading") as bar:
        yield lambda documents, size: bar.show(
            documents, note=f"documents tokenised, {size / 1e6:.1f} MB"
        )


def piece_bytes(tokenizer: Any, size: int = 0) -> np.ndarray:
    """How many UTF-8 bytes of text each id stands for, int64, at least ``size``; special ids: 0.

    See :class:`.token_bytes.TokenBytes`: exact but for the space that some tokenizers put in front of a
    text, which counts.
    """
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(max(size, max(vocabulary.values(), default=-1) + 1), np.int64)
    pieces = TokenBytes(tokenizer)
    for number in vocabulary.values():
        if not (number in added and added[number].special):
            lengths[number] = len(pieces.of(number) or b"")
    return lengths


def save_packed(path: Path, packed: PackedTokens, skipped: Sequence[str] = ()) -> None:
    """Writes the stream and what was skipped as ``.npz``, whole or not at all."""
    # As JSON: NumPy would give every name the room of the longest.
    about = json.dumps(
        {"names": [*packed.names], "text_bytes": packed.text_bytes, "skipped": [*skipped]}
    )
    # A file, as of a path savez would change the name.
    with whole_path(path) as part, part.open("wb") as file:
        np.savez(
            file,
            tokens=packed.tokens,
            starts=packed.starts,
            about=np.frombuffer(about.encode(), np.uint8),
        )


def load_packed(path: Path) -> tuple[PackedTokens, list[str]]:
    """What :func:`save_packed` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged or another kind of file.
    """
    try:
        # Of a path, NumPy leaves a damaged archive open. Reading compares each array's checksum.
        with path.open("rb") as file, np.load(file) as arrays:
            tokens, starts = arrays["tokens"], arrays["starts"]
            about = json.loads(arrays["about"].tobytes())
        names, skipped = tuple(about["names"]), list(about["skipped"])
        packed = PackedTokens(tokens, starts, names, int(about["text_bytes"]))
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy and zipfile raise almost anything of a damaged archive.
        raise InputError(f"{path}: not whole packed tokens: {error}") from None
    if len(starts) != len(names):
        raise InputError(f"{path}: {len(starts)} documents, but {len(names)} names")
    return packed, skipped


def _load_whole(path: Path) -> tuple[PackedTokens, list[str]] | None:
    try:
        return load_packed(path)
    except (FileNotFoundError, InputError):
        return None
