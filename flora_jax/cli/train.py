"""``flora-jax train``: one adapter for each data set, all in one run."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora_jax.adapters.registry import TRAITS, options, owners
from flora_jax.cli.common import MODEL_HELP, cache_directory, named_values, prepare_jax, say
from flora_jax.cli.options import takes
from flora_jax.errors import InputError, RunError
from flora_jax.files import require_file

if TYPE_CHECKING:
    from flora_jax.train.find_rate import Search
    from flora_jax.train.options import TrainOptions

Data = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="Required: trains adapter NAME on a .jsonl(.gz, .xz) or "
                 "Parquet file, a directory of source files or a hub data set; may be repeated."),
]  # fmt: skip

# Of a search for a rate: its steps where the command line has none, and what a file of options says
# of the run to come, not of the search.
_SEARCH_STEPS = 60
_OF_THE_RUN = ("output", "resume", "steps", "warmup_steps")
_RATES = ", ".join(
    " ".join([f"{kind} {traits.learning_rate:g}",
              *(f"({v} {rate:g})" for own in traits.options for v, rate in own.rates.items())])
    for kind, traits in TRAITS.items()
)  # fmt: skip
_MEETING = ("coordinator", "num_processes", "process_id")
# Of the command line what is no part of a run's options: where and how, not what.
_BESIDE = ("config", "output", "resume", "find_rate", "rates", *_MEETING)


def _own(name: str, default: str) -> str:
    """The help of an option that only some kinds have."""
    values = "".join(f"{choice}, " for choice in options()[name].choices)
    return f"Of {' and '.join(owners(name))}: {values}default {default}."


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """The command line; ``None`` is what is not given. Most are fields of ``TrainOptions``."""

    model: Annotated[str | None, typer.Argument(help=f"Required: {MODEL_HELP}")] = None
    output: Annotated[
        Path | None,
        typer.Option(
            help="Required, except with --find-rate: a new directory, of NAME/ for each adapter, "
            "metrics.jsonl, curve.png."
        ),
    ] = None
    kind: Annotated[str | None, typer.Option(help=f"Required: {', '.join(TRAITS)}.")] = None
    data: Data = None
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Held-out data of adapter NAME; may be repeated."),
    ] = None
    rank: Annotated[int | None, typer.Option(help="Default 1.")] = None
    targets: Annotated[
        str | None,
        typer.Option(help="Projections, comma-separated, by name. Default: PEFT's for LoRA."),
    ] = None
    init: Annotated[str | None, typer.Option(help=_own("init", "zero_sum"))] = None
    reduction: Annotated[str | None, typer.Option(help=_own("reduction", "mean"))] = None
    alpha: Annotated[float | None, typer.Option(help=_own("alpha", "the rank"))] = None
    dropout: Annotated[float | None, typer.Option(help=_own("dropout", "0"))] = None
    steps: Annotated[int | None, typer.Option(help="Default 1500.")] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of a step, split evenly over the adapters. Default 8."),
    ] = None
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a row. Default 512.")] = None
    accumulate: Annotated[
        int | None, typer.Option(help="Passes that a step's rows are split into. Default 1.")
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Peak. Default {_RATES}."),
    ] = None
    schedule: Annotated[
        str | None, typer.Option(help="cosine, linear or constant. Default cosine.")
    ] = None
    warmup_steps: Annotated[
        int | None, typer.Option(help="Default a tenth of the steps, at most 100.")
    ] = None
    weight_decay: Annotated[
        float | None,
        typer.Option(help="AdamW's, towards zero factors; a DoRA's lengths too. Default 0."),
    ] = None
    clip: Annotated[
        float | None, typer.Option(help="Largest gradient norm of an adapter. Default 1.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Default 0.")] = None
    dtype: Annotated[
        str | None, typer.Option(help="Of the base. Default float32 on CPU, else bfloat16.")
    ] = None
    quantize: Annotated[
        str | None, typer.Option(help="The base's weights: int8, int4 or none. Default none.")
    ] = None
    remat: Annotated[
        str | None,
        typer.Option(help="Recompute activations: none, products or full. Default none."),
    ] = None
    mesh: Annotated[
        str | None, typer.Option(help="Devices, as data=2,tensor=4. Default one device.")
    ] = None
    text_column: Annotated[str | None, typer.Option(help="Default content, else text.")] = None
    max_corrupt: Annotated[
        float | None, typer.Option(help="Share of unreadable lines that stops. Default 0.01.")
    ] = None
    eval_every: Annotated[
        int | None, typer.Option(help="Steps; also before the first and at the end. Default 250.")
    ] = None
    eval_windows: Annotated[
        int | None, typer.Option(help="Rows of validation at most. Default all.")
    ] = None
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default 100.")
    ] = None
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep. Default 2.")] = None
    config: Annotated[
        Path | None,
        typer.Option(help="A .toml or .json file of these options; the command line wins."),
    ] = None
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where process 0 of several listens; each is started with the same options.",
        ),
    ] = None
    num_processes: Annotated[int | None, typer.Option(help="How many train together.")] = None
    process_id: Annotated[int | None, typer.Option(help="Which one this is, from 0.")] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in OUTPUT, if any; what is not given is that run's, so "
            "that --output and --resume are enough.",
        ),
    ] = False
    find_rate: Annotated[
        bool,
        typer.Option(
            "--find-rate",
            help="In place of the run, compare learning rates for it on the validation data and "
            "recommend one. A step has the run's rows for each rate: seven rates cost seven times the "
            f"run's time and memory a step. {_SEARCH_STEPS} steps and 64 rows of validation by "
            "default; --output is a new .json file, if given. Of --config, "
            f"{', '.join(_OF_THE_RUN)} are not used.",
        ),
    ] = False
    rates: Annotated[
        str | None,
        typer.Option(
            help="Those of --find-rate, as 1e-3,3e-3,1e-2. Default seven, each 4 times the one "
            "before, from a sixteenth of --learning-rate on."
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """What is given of ``TrainOptions``, by the name of its field."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _BESIDE]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name in ("data", "validation"):
            if name in given:
                # As written: "./a/b" is a directory and "a/b" may be a data set of the hub.
                given[name] = named_values(given[name], name)
        return given

    def meeting(self) -> dict[str, Any]:
        """Where several processes meet; ``None`` is what is not given."""
        return {name: getattr(self, name) for name in _MEETING}


@takes(TrainCommand)
def train(command: TrainCommand) -> None:
    """Fine-tunes adapters on a frozen base, any number of them in one run.

    What is required is so here or in the file of --config; a run that is resumed has it already.
    """
    (_find_rate if command.find_rate else _train)(command)


def _options(
    command: TrainCommand, file: dict[str, Any], resumed: Path | None = None
) -> TrainOptions:
    """The run's options: those of the command line, else those of its file, else those of the run in
    the directory ``resumed``.

    Raises:
        InputError: an option that is wrong, unknown, missing or not the resumed run's; names the file
            where that has it.
    """
    from flora_jax.train.options import CONFIG, make_options

    given = command.options()
    config = command.config
    origins = {} if config is None else {name: config for name in file if name not in given}
    values = file | given
    if resumed is not None:
        from flora_jax.train.directory import options_to_resume

        whole = options_to_resume(resumed, values)
        origins |= dict.fromkeys(whole.keys() - values.keys(), resumed / CONFIG)
        values = whole
    return make_options(values, origins)


def _file(command: TrainCommand) -> dict[str, Any]:
    """What the file of options says, if there is one, by the name of the option."""
    from flora_jax.train.options import read_file

    values = {} if command.config is None else read_file(command.config)
    # A file in a file is not read.
    values.pop("config", None)
    return values


def _train(command: TrainCommand) -> None:
    """Trains, and says where each adapter is."""
    file, config = _file(command), command.config
    place, again = file.pop("output", None), file.pop("resume", False)
    if command.output is not None:
        place = command.output
    if command.resume:  # Its absence wishes nothing: a file may ask for it.
        again = True
    if place is None:
        raise InputError("output is missing, expected --output DIR")
    if not isinstance(place, (str, Path)):
        raise InputError(f"{config}: output is {place!r}, expected a directory")
    if not isinstance(again, bool):
        raise InputError(f"{config}: resume is {again!r}, expected true or false")
    place = Path(place)
    options = _options(command, file, place if again else None)
    if command.rates is not None:
        raise InputError(f"rates is {command.rates!r}, expected none without --find-rate")
    # Read by the hub's clients at import.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from flora_jax.train.interrupt import InterruptedRun, on_signals
    from flora_jax.train.processes import join

    with on_signals() as interrupt:
        prepare_jax()
        join(*command.meeting().values())
        from flora_jax.train.run import train as run

        try:
            folders = run(
                options, place, resume=again,
                cache=cache_directory() / "tokens", say=say, interrupt=interrupt,
            )  # fmt: skip
        except InterruptedRun as error:
            say(f"flora-jax: {error}{_going_on(command, place)}")
            raise SystemExit(128 + error.number) from None
    for name, folder in folders.items():
        say(f"{name} -> {folder}")


def _going_on(command: TrainCommand, place: Path) -> str:
    """The command that resumes the run, where that has its options already and is one process."""
    from flora_jax.train.options import CONFIG

    if not (place / CONFIG).exists() or any(v is not None for v in command.meeting().values()):
        return ""
    return f": flora-jax train --output {shlex.quote(str(place))} --resume"


def _find_rate(command: TrainCommand) -> None:
    """Prints how well each rate did, and writes it to ``--output``, a new file.

    Raises:
        InputError: see :func:`flora_jax.train.find_rate.find_rate`; an option that a search does not
            take; or ``--output`` cannot be written.
        RunError: no rate did well.
    """
    file = {name: value for name, value in _file(command).items() if name not in _OF_THE_RUN}
    options = _options(command, {**file, "steps": _SEARCH_STEPS})
    for name, value in ({"resume": command.resume or None} | command.meeting()).items():
        if value is not None:
            raise InputError(f"{name} is {value}, expected none with --find-rate")
    from flora_jax.train.options import parse_rates

    rates, output = command.rates, command.output
    wanted = None if rates is None else parse_rates(rates)
    if output is not None:
        if output.suffix != ".json" or output.exists():
            there = ", which exists already" if output.exists() else ""
            raise InputError(
                f"output is {output}{there}, expected a new .json file with --find-rate"
            )
        require_file(output, overwrite=False)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    prepare_jax()
    from flora_jax.bench.receipts.report import table, write_results
    from flora_jax.train.find_rate import find_rate

    found = find_rate(options, wanted, cache=cache_directory() / "tokens", say=say)
    if output is not None:
        write_results(output, found.to_json())
    title = f"{options.kind} of rank {options.rank} for {options.model}, {options.steps} steps"
    table(title, _rows(found), _COLUMNS)
    best = found.best()
    if best is None:
        raise RunError(
            f"no rate did well on all data: the lowest was {found.rates[0]:g}, --rates takes others"
        )
    print(f"recommended: --learning-rate {best:g}")
    if (edge := found.edge()) is not None:
        beyond = "lower" if edge == "lowest" else "higher"
        print(
            f"it is the {edge} that was tried, a {beyond} one may be better: --learning-rate "
            f"{best:g} with --find-rate searches around it"
        )


_COLUMNS = {
    "rate": "rate", "name": "data", "first": "loss first", "last": "last",
    "before": "held-out bits per byte before", "after": "after", "note": "",
}  # fmt: skip


def _rows(found: Search) -> list[dict[str, str]]:
    """A line of the table for each trial."""
    best = {name: found.best(name) for name in found.options.data}
    return [
        {
            "rate": f"{trial.rate:g}", "name": trial.name,
            "first": f"{trial.first_loss:.4f}", "last": f"{trial.last_loss:.4f}",
            "before": f"{trial.bits_before:.4f}", "after": f"{trial.bits_after:.4f}",
            "note": trial.problem or ("best" if trial.rate == best[trial.name] else ""),
        }
        for trial in found.trials
    ]  # fmt: skip
