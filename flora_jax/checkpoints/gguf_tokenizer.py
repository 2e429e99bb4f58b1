"""The tokenizer of a GGUF file: read by transformers, mended where its ids are not llama.cpp's."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flora_jax.errors import InputError, one_line
from flora_jax.models.gguf_names import BYTE_LEVEL, SENTENCEPIECE, SPLITS, Split

# The ids that a file may name; of the last transformers takes no notice.
_SPECIAL = ("bos", "eos", "unknown", "padding", "eot")
_BLANK = "\u2581"


def check_tokens(path: Path, facts: Mapping[str, Any]) -> None:
    """Raises ``InputError`` unless a file's metadata name a vocabulary, and special tokens of it."""
    kind: Any = facts.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise InputError(
            f"{path}: tokenizer.ggml.model is {kind!r}, expected {' or '.join(map(repr, _KINDS))}"
        )
    tokens: Any = facts.get("tokenizer.ggml.tokens")
    if not _is_list(tokens, str):
        raise InputError(f"{path}: tokenizer.ggml.tokens is missing, expected a list of texts")
    for name in _SPECIAL:
        number = facts.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise InputError(
                f"{path}: tokenizer.ggml.{name}_token_id is {number!r}, expected below {len(tokens)}, "
                "the number of tokens"
            )
    for name in _added(facts):
        if facts.get(f"tokenizer.ggml.{name}_token_id") is None:
            raise InputError(
                f"{path}: tokenizer.ggml.{name}_token_id is missing, expected the token that is "
                "added to every text"
            )
    _KINDS[kind].check(path, facts, tokens)


def _is_list(found: Any, *types: type) -> bool:
    return isinstance(found, list) and found != [] and all(isinstance(one, types) for one in found)


def _check_merges(path: Path, facts: Mapping[str, Any], tokens: list[str]) -> None:
    merges = facts.get("tokenizer.ggml.merges", [])
    if not isinstance(merges, list) or "tokenizer.ggml.merges" not in facts:
        raise InputError(f"{path}: tokenizer.ggml.merges is missing, expected a list of texts")
    known = set(tokens)
    for place, merge in enumerate(merges):
        pair = str(merge).split(" ")
        if len(pair) != 2 or not known.issuperset((*pair, "".join(pair))):
            raise InputError(
                f"{path}: tokenizer.ggml.merges[{place}] is {merge!r}, expected two tokens that are a "
                "token together"
            )


def _check_scores(path: Path, facts: Mapping[str, Any], tokens: list[str]) -> None:
    scores: Any = facts.get("tokenizer.ggml.scores")
    if not _is_list(scores, int, float) or len(scores) != len(tokens):
        found = f"{len(scores)} values" if isinstance(scores, list) else repr(scores)
        raise InputError(
            f"{path}: tokenizer.ggml.scores is {found}, expected a number for each of {len(tokens)} "
            "tokens"
        )


def _added(facts: Mapping[str, Any]) -> list[str]:
    """Which of "bos" and "eos" stand around every text.

    Whether a tokenizer adds these is no part of its vocabulary; the defaults are llama.cpp's.
    """
    split = SPLITS.get(facts.get("tokenizer.ggml.pre", ""), Split())
    before = facts["tokenizer.ggml.model"] == SENTENCEPIECE or split.whole
    defaults = {"bos": before, "eos": False}
    return [n for n, usual in defaults.items() if facts.get(f"tokenizer.ggml.add_{n}_token", usual)]


def read_tokenizer(path: Path, facts: Mapping[str, Any], context: int) -> Any:
    """transformers' tokenizer of the file, with llama.cpp's ids.

    Args:
        path: the file.
        facts: its metadata, which :func:`check_tokens` let pass.
        context: the longest text of the model, in tokens.

    Raises:
        InputError: transformers cannot read it, or it is one whose ids would not be llama.cpp's.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = facts["tokenizer.ggml.tokens"]
    with _alone(path) as alone:
        try:
            read = PreTrainedTokenizerFast.from_pretrained(alone.parent, gguf_file=alone.name)
        except Exception as error:  # Of many kinds, of other libraries too.
            said = one_line(error)
            for ours in (alone, alone.parent):  # Nothing that a user knows.
                said = said.replace(str(ours), str(path))
            raise InputError(f"{path}: transformers cannot read it: {said}") from None
    backend = read.backend_tokenizer
    _KINDS[facts["tokenizer.ggml.model"]].mend(path, facts, backend)
    ids = {name: facts[f"tokenizer.ggml.{name}_token_id"] for name in _added(facts)}
    _add_ends(backend, {name: (tokens[number], int(number)) for name, number in ids.items()})
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in names.items()
        if facts.get(f"tokenizer.ggml.{theirs}_token_id") is not None
    }
    # A class of its own would split the text anew in its own way when it is loaded.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=context,
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokens):
        raise InputError(f"{path}: the tokenizer has id {highest}, the file {len(tokens)} tokens")
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    return tokenizer


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """The file in a directory of its own: transformers takes a tokenizer that lies beside it instead."""
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place) / "model.gguf"
        try:
            alone.symlink_to(path.absolute())
        except OSError:  # A file system without links.
            shutil.copyfile(path, alone)
        yield alone


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
    """Which blanks a SentencePiece tokenizer puts in front, and takes away again from its text.

    llama.cpp puts one in front of every stretch between special tokens, also where that begins with a
    blank, and takes one from the text of a whole; or neither.
    """
    from tokenizers import decoders, normalizers

    blanks: Any = normalizers.Replace(" ", _BLANK)
    parts = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if facts.get("tokenizer.ggml.add_space_prefix", True):
        blanks = normalizers.Sequence([normalizers.Prepend(_BLANK), blanks])
        parts.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = blanks
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(parts)


class _Kind(NamedTuple):
    """What is own to a kind of tokenizer: the check of what it merges text by, and what is mended."""

    check: Callable[[Path, Mapping[str, Any], list[str]], None]
    mend: Callable[[Path, Mapping[str, Any], Any], None]


# By ``tokenizer.ggml.model``.
_KINDS: Mapping[str, _Kind] = {
    BYTE_LEVEL: _Kind(_check_merges, _mend_byte_level),
    SENTENCEPIECE: _Kind(_check_scores, _mend_sentencepiece),
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
