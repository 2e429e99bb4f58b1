"""``flora-jax convert-adapter``: an adapter of one kind as one of another."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from flora_jax.adapters.registry import convertible
from flora_jax.cli.common import MODEL_HELP, cache_directory, prepare_jax, say
from flora_jax.cli.options import takes
from flora_jax.errors import InputError
from flora_jax.files import require_new

if TYPE_CHECKING:
    from flora_jax.adapters.model_adapter import ModelAdapter
    from flora_jax.checkpoints import Opened
    from flora_jax.models.model import Model
    from flora_jax.peft.convert import Converted

# Of a card's paragraphs, as of its other lines.
_WIDTH = 106
# Options that only text gives a meaning.
_OF_TEXT = ("steps", "learning_rate", "batch_size", "seq_len", "text_column")


@dataclasses.dataclass(frozen=True)
class ConvertCommand:
    """The command line; ``None`` is what is not given."""

    source: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A folder, or a shipped adapter.")
    ]
    base: Annotated[str, typer.Option(metavar="MODEL", help=f"Of the adapter. {MODEL_HELP}")]
    to: Annotated[str, typer.Option(help=f"The kind to make: {', '.join(convertible())}.")]
    output: Annotated[Path, typer.Option(help="A directory that is new or empty.")]
    rank: Annotated[
        int | None, typer.Option(min=1, help="At most. Default: the exact one, else ADAPTER's.")
    ] = None
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="The nearest where none is the same; its error is in the card."
        ),
    ] = False
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A little of ADAPTER's text, to come nearer; as of flora-jax train.",
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of distilling from the data; 0 only weights the fit. Default 200."
        ),
    ] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of distilling. Default as of flora-jax train.")
    ] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a step. Default 8.")] = None
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. Default 512, or the whole context.")
    ] = None
    text_column: Annotated[str | None, typer.Option(help="Default content, else text.")] = None
    quantize: Annotated[
        Literal["none", "int8", "int4"], typer.Option(help="How the base's weights are held.")
    ] = "none"
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the fit's starts and the rows' order.")
    ] = 0


@takes(ConvertCommand)
def convert_adapter(command: ConvertCommand) -> None:
    """Writes an adapter as another kind: the same weights where it can be, else the nearest.

    Errors are those of the adapted weights, relative to how far the adapter moves them; with data also
    what the converted adapter predicts of text that is held out.
    """
    if command.to not in convertible():
        raise InputError(f"--to is {command.to!r}, expected one of {', '.join(convertible())}")
    given = [name for name in _OF_TEXT if getattr(command, name) is not None]
    if command.data is None and given:
        raise InputError(f"{_option(given[0])} belongs to --data, which is not given")
    if command.learning_rate is not None and not 0 < command.learning_rate <= 1e38:
        raise InputError(f"--learning-rate is {command.learning_rate:g}, expected more than 0")
    require_new(command.output)
    prepare_jax()
    from flora_jax.adapters.projections import check_rank
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.peft.read import read_adapter
    from flora_jax.peft.write import write_adapter
    from flora_jax.shipped import adapter_source

    opened = open_checkpoint(command.base)
    folder = adapter_source(command.source)
    adapter = read_adapter(folder, opened.config.projections(), opened.config.n_layer)
    if command.rank is not None:  # As of training: more is a slip, and would be long at work.
        check_rank(command.rank, adapter.projections, adapter.targets(), "--rank", command.base)
    made = (_without_data if command.data is None else _with_data)(command, opened, adapter)
    base, result = command.base, made.result
    if command.quantize != "none":  # What is fitted, and a DoRA's lengths, are so for these alone.
        base = f"{base} with {command.quantize} weights"
        result = f"over {base} {result}"
    card = _card(adapter, made, base, result)
    write_adapter(made.converted.adapter, command.output, command.base, card=card)
    say(f"{command.output}: {result}")


class _Made(NamedTuple):
    """What was made, in which way, and how well; ``distilled`` says whether its weights were moved on."""

    converted: Converted
    way: str
    result: str
    distilled: bool = False


def _option(name: str) -> str:
    """How a field is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _load(command: ConvertCommand, opened: Opened) -> Model:
    return opened.load("float32", quantize=None if command.quantize == "none" else command.quantize)


def _without_data(command: ConvertCommand, opened: Opened, adapter: ModelAdapter) -> _Made:
    from flora_jax.peft.convert import Base, convert

    model = _load(command, opened)
    made = convert(
        adapter, command.to, Base(model.weight, model.bias), rank=command.rank,
        approximate=command.approximate, seed=command.seed, named=_option("approximate"),
    )  # fmt: skip
    return _Made(made, "without data", _how_well(made))


def _with_data(command: ConvertCommand, opened: Opened, adapter: ModelAdapter) -> _Made:
    """The same with the help of text."""
    from flora_jax.train.conversion import ConvertOptions, convert_with_text, read_text
    from flora_jax.train.distil import DistilOptions

    # Named as the fields.
    names = {
        "steps": "steps",
        "learning_rate": "learning_rate",
        "batch_size": "rows",
        "seq_len": "length",
    }
    given = {field: getattr(command, name) for name, field in names.items()}
    given = {field: value for field, value in given.items() if value is not None}
    own = DistilOptions(**given, seed=command.seed)
    if command.seq_len is None:
        own = dataclasses.replace(own, length=min(own.length, opened.config.n_positions))
    assert command.data is not None
    text = read_text(
        command.data, opened, own.length, column=command.text_column,
        cache=cache_directory() / "tokens", say=say, named=_option("seq_len"),
    )  # fmt: skip
    wanted = ConvertOptions(command.to, command.rank, command.approximate, own)
    taught = convert_with_text(
        adapter, _load(command, opened), text, wanted, say, _option("approximate")
    )
    made, quality = taught.converted, taught.quality
    way = "exactly, so that the data only measured it"
    if taught.windows:
        way = (
            f"fitted under the moments of the inputs of {taught.windows} windows of {own.length} tokens "
            f"of {command.data}"
        )
    if taught.steps:
        way += (
            f", then distilled from the source's predictions of it for {taught.steps} steps of "
            f"{own.rows} windows ({taught.steps * own.rows * own.length:,} tokens) at a peak rate of "
            f"{own.rate(command.to):g}"
        )
    before = "" if taught.fitted is None else f" ({taught.fitted.divergence:.4f} before distilling)"
    kept = "the source gains nothing"
    if quality.kept is not None:
        kept = f"{quality.kept:.1%} of the source's gain is kept"
    predicted = (
        f"on {quality.tokens:,} held-out tokens KL(source, this) is {quality.divergence:.4f} nats a token"
        f"{before}, bits per byte are {quality.base:.4f} of the base, {quality.source:.4f} of the source "
        f"and {quality.made:.4f} of this"
    )
    if not taught.steps:
        return _Made(made, way, f"{_how_well(made)}; {predicted}: {kept}")
    # The weights' error comes last: it may be large where the predictions are good.
    result = (
        f"{kept}; {_same(made)}; {predicted}; distilling moves the weights elsewhere, so that their "
        f"error, {made.total:.1%} of the adapter's change, is no measure"
    )
    return _Made(made, way, result, distilled=True)


def _how_well(made: Converted) -> str:
    if len(made.exact) == len(made.differences):
        return f"the same weights in all {len(made.exact)} projections, to rounding"
    error = f"{made.total:.1%} of the adapter's change of the weights is left as error"
    return f"{error}; {_same(made)}"


def _same(made: Converted) -> str:
    bias = max(found.bias for found in made.differences.values())
    lost = f"; of biases up to {bias:.2%} is lost" if bias else ""
    return f"{len(made.exact)} of {len(made.differences)} projections are the same{lost}"


def _card(source: ModelAdapter, whole: _Made, base: str, result: str) -> str:
    made = whole.converted
    adapter, targets = made.adapter, made.adapter.targets()
    rows = []
    for target in targets:
        own = [found for (_, name), found in made.differences.items() if name == target]
        same = sum((layer, target) in made.exact for layer in range(len(adapter.layers)))
        rows.append(
            f"| {target} | {source.rank(target)} | {adapter.rank(target)} | {same} of {len(own)} | "
            f"{max(found.weight for found in own):.4f} | {max(found.bias for found in own):.4f} |"
        )
    paragraphs = [
        f"An adapter of kind {adapter.kind} for {base}, converted from one of kind {source.kind} by "
        f"`flora-jax convert-adapter` {whole.way}. It has {adapter.parameters()} parameters.",
        f"{result[0].upper()}{result[1:]}.",
        _LEGEND + (_DISTILLED if whole.distilled else ""),
    ]
    filled = [
        textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    ]
    table = "\n".join([*_HEAD, *rows])
    return "\n\n".join([f"# {adapter.kind}, made of {source.kind}", *filled, table]) + "\n"


_LEGEND = (
    "Errors are the largest of the target's layers: of weights ‖to - from‖ / ‖from - base‖ (0 is the "
    "same, 1 no better than no adapter; weighted with the inputs' moments where those were taken), of "
    "biases ‖to - from‖ / ‖base‖."
)
_DISTILLED = (
    " Distilling moved the weights elsewhere, to where the predictions are near the source's: here their "
    "error, which may be above 1, is no measure of the adapter; the share of the gain is."
)
_HEAD = (
    "| target | rank before | rank | the same | weights' error | biases' error |",
    "|---|---|---|---|---|---|",
)
