"""An adapter as one of another kind with the help of a little text.

The text gives the moments of the projections' inputs, which weight the fit, then distils the adapted
model's predictions into the fitted factors; a tenth of it measures the result. Ties
:mod:`flora_jax.peft.convert` to a model; knows nothing of the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.checkpoints import Opened
from flora_jax.errors import InputError
from flora_jax.models.family import positions_in_words
from flora_jax.models.model import Model
from flora_jax.peft.convert import Base, Converted, Moments, convert, differences
from flora_jax.terminal import progress
from flora_jax.train.choice import choose
from flora_jax.train.data.packing import Batch, PackedTokens, hold_out
from flora_jax.train.data.tokens import piece_bytes, tokenize, tokenizing
from flora_jax.train.directory import report_documents
from flora_jax.train.distil import DistilOptions, Judge, Quality, distil
from flora_jax.train.moments import input_moments
from flora_jax.train.step import StepOptions

# Windows of which the moments are taken, and those held out that are looked at.
MOMENT_WINDOWS = 64
HELD_OUT_WINDOWS = 64


class Text(NamedTuple):
    """Text to learn from and text that is held out, and the bytes that each token stands for ``[V]``."""

    training: PackedTokens
    held_out: PackedTokens
    piece_bytes: np.ndarray


def read_text(
    source: str,
    base: Opened,
    length: int,
    *,
    column: str | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    named: str = "seq_len",
) -> Text:
    """The documents of ``source`` (see :func:`.data.documents.read_documents`), a tenth held out.

    Args:
        source: a file, a directory or a hub data set.
        base: whose tokenizer is used.
        length: tokens of a window.
        column: of the text.
        cache: where tokenised data is kept between runs.
        say: takes lines for the user: what was read, and what of it was skipped.
        named: what messages call ``length``.

    Raises:
        InputError: the base has no tokenizer or no end token of its vocabulary; ``length`` is more than
            its context; unreadable data; or too little of it for a window and something held out.
    """
    config = base.config
    if length > config.n_positions:
        raise InputError(
            f"{named} is {length}, the model's context has {positions_in_words(config)}"
        )
    tokenizer, end_id = base.text_tokens("text")
    with tokenizing() as watch:
        packed, skipped = tokenize(
            source, tokenizer, end_id, column=column, cache=cache, watch=watch
        )
    lengths = piece_bytes(tokenizer, config.vocab_size)
    training, held_out = hold_out(packed, lengths)
    if len(training.tokens) <= length:
        raise InputError(
            f"{source}: {len(training.tokens)} tokens beside what is held out, expected more than "
            f"the {length} of a window ({named})"
        )
    for part in (training, held_out):
        try:
            part.windows(length)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
    report_documents(f"data {source}", packed, skipped, say)
    return Text(training, held_out, lengths)


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What is wanted: see :func:`flora_jax.peft.convert.convert` and :class:`.distil.DistilOptions`.

    ``distil.seed`` is also that of the fit's random starts.
    """

    to: str
    rank: int | None = None
    approximate: bool = False
    distil: DistilOptions = dataclasses.field(default_factory=DistilOptions)


class Taught(NamedTuple):
    """A conversion, and how well what was fitted and what was then distilled do on held-out text.

    ``fitted`` is ``None`` where nothing was distilled; ``steps`` says how often; ``windows`` are those
    that gave moments, none for an exact conversion.
    """

    converted: Converted
    quality: Quality
    fitted: Quality | None
    steps: int
    windows: int


def convert_with_text(
    adapter: ModelAdapter,
    model: Model,
    text: Text,
    options: ConvertOptions,
    say: Callable[[str], None] = print,
    named: str = "approximate",
) -> Taught:
    """``adapter`` as one of another kind: the same where it can be, else fitted and distilled.

    Projections of which nothing differs stay as they are, and where that is all of them nothing is
    distilled.

    Args:
        adapter: on ``model``; of any kind.
        model: the base, its weights held in any way.
        text: of what the adapter is for.
        options: see there.
        say: takes lines for the user.
        named: what messages call ``options.approximate``.

    Raises:
        InputError: see :func:`flora_jax.peft.convert.convert`.
        NonFiniteLossError: distilling diverged.
    """
    own = options.distil

    def moments() -> Moments:
        # Here it is known that something differs, and nothing long has begun.
        if own.steps:
            say(
                f"distilling will take {own.steps} steps of {own.rows} rows of {own.length} tokens, "
                "after the fit"
            )
        return moments_of(model, adapter, text.training, own)

    program = choose(StepOptions(), model.config, model.embedding.dtype, own.length, say)
    base = Base(model.weight, model.bias)
    made = convert(
        adapter, options.to, base, rank=options.rank, approximate=options.approximate,
        moments=moments, seed=own.seed, named=named,
    )  # fmt: skip
    judge = Judge(model, adapter, text.held_out, text.piece_bytes, own, HELD_OUT_WINDOWS, program)
    quality = judge(made.adapter)
    if made.moments is None:
        return Taught(made, quality, None, steps=0, windows=0)
    windows = min(MOMENT_WINDOWS, text.training.windows(own.length))
    if not own.steps:
        return Taught(made, quality, None, steps=0, windows=windows)
    student = distil(model, adapter, made.adapter, text.training, own, program, held=made.exact)
    found = made._replace(
        adapter=student, differences=differences(adapter, student, base, made.moments)
    )
    return Taught(found, judge(student), quality, own.steps, windows)


def moments_of(
    model: Model, adapter: ModelAdapter, text: PackedTokens, options: DistilOptions
) -> Moments:
    """:func:`.moments.input_moments` of windows that are spread evenly over ``text``."""
    batches = list(text.evaluation(options.length, options.rows, MOMENT_WINDOWS))
    with progress("moments", len(batches)) as bar:

        def shown() -> Iterator[Batch]:
            for batch in batches:
                yield batch
                bar.advance()

        return input_moments(model, adapter, shown())
