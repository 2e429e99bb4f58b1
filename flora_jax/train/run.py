"""One fine-tuning run from its options to adapter folders, resumable at any moment.

Ties the data, the step and the loop to a directory; knows nothing of the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.adapters.model_adapter import ModelAdapter, init_adapter
from flora_jax.adapters.projections import check_rank, match_targets
from flora_jax.adapters.registry import TRAITS
from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.checkpoints.digest import model_digest
from flora_jax.errors import InputError
from flora_jax.files import directory_lock
from flora_jax.models.family import ModelConfig, positions_in_words
from flora_jax.models.model import Model
from flora_jax.models.sharding import make_mesh
from flora_jax.train.choice import choose
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.data.tokens import piece_bytes, tokenize, tokenizing
from flora_jax.train.directory import (
    Tokenized,
    check_directory,
    claim_directory,
    is_finished,
    report_data,
)
from flora_jax.train.evaluation import Evaluator
from flora_jax.train.interrupt import Interrupt
from flora_jax.train.loop import LoopOptions, Work, run_loop
from flora_jax.train.options import DATA, TrainOptions, make_options
from flora_jax.train.processes import is_first, told
from flora_jax.train.results import write_curve, write_results
from flora_jax.train.step import (
    GroupedBatch,
    StepOptions,
    TrainState,
    group,
    init_adapter_state,
    make_adapter_step,
    make_optimizer,
    make_optimizer_of_peak,
    make_schedule,
    make_scorer,
)

TrainStep = Callable[[TrainState, GroupedBatch], tuple[TrainState, dict[str, jax.Array]]]


def train(
    options: TrainOptions,
    output: str | Path,
    *,
    resume: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    interrupt: Interrupt | None = None,
) -> dict[str, Path]:
    """Trains one adapter for each entry of ``options.data``; their folders by name.

    Several processes that have met (:func:`flora_jax.train.processes.join`) call it with the same
    arguments, and train one run.

    Args:
        options: of the run; saved as ``output/config.json``.
        output: new or empty, or with ``resume`` the directory of a run with the same options. No other
            run may use it at the same time; the processes of one see the same directory.
        resume: go on from the newest checkpoint, or start where there is none.
        cache: where tokenised data is kept between runs.
        say: takes notes for the user, a line each.
        interrupt: looked at between two steps and between two batches of validation or of text.

    Raises:
        InputError: anything in the options, the data or the model that does not fit, or another process
            uses ``output``.
        NonFiniteLossError: training diverged.
        InterruptedRun: ``interrupt`` was set; ``resume`` goes on.
    """
    options = _over_all_devices(options.effective(jax.default_backend()))
    output, interrupt = Path(output), interrupt or Interrupt()
    folders = {name: output / name for name in options.data}
    with contextlib.ExitStack() as held:

        def begin() -> bool:
            held.enter_context(directory_lock(output))
            check_directory(options, output, resume)
            return is_finished(options, output)

        finished = told(begin)
        if not is_first():
            say = _silent
        if finished and is_first():
            write_curve(output, list(options.data), say)
            say(f"{output}: this run is finished, nothing to do")
        if finished:
            return folders
        run = prepare(options, output, cache=cache, say=say, interrupt=interrupt)
        adapters = run.train(output)
        if is_first():
            write_results(options, output, adapters, say)
    return folders


def prepare(
    options: TrainOptions,
    output: Path | None,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    interrupt: Interrupt | None = None,
) -> Run:
    """Reads the base and the data, and writes what ``output`` says of them; nothing is trained.

    Args and errors are those of :func:`train`; ``options`` are effective, and the caller holds the lock
    of ``output``. Without one nothing is written.
    """
    interrupt = interrupt or Interrupt()
    base = _open(options)
    mesh = _mesh(options)
    leave_out = () if output is None else (output,)
    training, validation = _read(options, base, cache, leave_out, interrupt)
    quantize = None if options.quantize == "none" else options.quantize
    model = base.load(options.dtype, mesh=mesh, quantize=quantize)
    interrupt.check()
    if output is not None:
        told(
            lambda: claim_directory(
                options, output, training, validation, model_digest(base.directory)
            )
        )
    report_data(training, validation, say, None if output is None else DATA)
    program = choose(
        StepOptions(options.accumulate, options.remat, options.dropout), base.config, options.dtype,
        options.seq_len, say, heads_split=options.devices()[1] > 1,
    )  # fmt: skip
    keys = {name: adapter_key(options.seed, name) for name in options.data}
    return Run(
        options=options,
        model=model,
        mesh=mesh,
        training={name: packed for name, (packed, _) in training.items()},
        validation={name: packed for name, (packed, _) in validation.items()},
        keys=keys,
        fresh={name: _fresh(options, model, key) for name, key in keys.items()},
        program=program,
        piece_bytes=piece_bytes(base.tokenizer, base.config.vocab_size),
        interrupt=interrupt,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to be trained.

    ``training``, ``keys``, ``fresh`` and a state's leading axis have the adapters in one order, that of
    the options; ``validation`` may lack some. ``keys`` are those that the adapters were drawn from,
    ``fresh`` the adapters before the first step, ``program`` is what the step is compiled for,
    ``piece_bytes [V]`` the bytes of text that a token stands for. ``rates`` are the adapters' own peak
    learning rates; ``None`` leaves all of them the one of the options.
    """

    options: TrainOptions
    model: Model
    mesh: Mesh | None
    training: Mapping[str, PackedTokens]
    validation: Mapping[str, PackedTokens]
    keys: Mapping[str, jax.Array]
    fresh: Mapping[str, ModelAdapter]
    program: StepOptions
    piece_bytes: np.ndarray
    interrupt: Interrupt
    rates: Mapping[str, float] | None = None

    def at_rates(self, rates: Sequence[float]) -> Run:
        """The run of a copy of each adapter at each rate, ``NAME@RATE``; all adapters at the first, then
        at the second and so on. A copy is trained as the adapter would be, on as many rows.
        """

        def copies(table: Mapping[str, Any]) -> dict[str, Any]:
            return {f"{name}@{rate}": table[name] for rate in rates for name in table}

        return dataclasses.replace(
            self,
            training=copies(self.training), validation=copies(self.validation),
            keys=copies(self.keys), fresh=copies(self.fresh),
            rates={f"{name}@{rate}": rate for rate in rates for name in self.fresh},
        )  # fmt: skip

    def start(self) -> tuple[TrainState, TrainStep]:
        """The state before the first step, and the step that takes it, donated, and a batch."""
        options = self.options

        def schedule_of(peak: Any) -> optax.Schedule:
            return make_schedule(options.schedule, peak, options.steps, options.warmup)

        own = {"clip": options.clip, "weight_decay": options.weight_decay}
        if self.rates is None:
            peaks_N, schedule = None, schedule_of(options.rate)
            optimizer = make_optimizer(schedule, **own)
        else:
            host_N = np.fromiter(self.rates.values(), np.float32)
            # An array of its own: a step donates it.
            peaks_N, schedule = jnp.array(host_N), schedule_of(host_N)
            optimizer = make_optimizer_of_peak(schedule_of, **own)
        fresh = [adapter.layers for adapter in self.fresh.values()]
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fresh)
        with jax.numpy_dtype_promotion("standard"):
            state = init_adapter_state(layers, optimizer, peaks_N)
        everywhere = self._everywhere
        dropout_N = jnp.stack([jax.random.fold_in(key, 1) for key in self.keys.values()])
        if everywhere is not None:
            state = jax.device_put(state, everywhere)
            data_NX = jax.device_put(jax.random.key_data(dropout_N), everywhere)
            dropout_N = jax.random.wrap_key_data(data_NX)
        step = make_adapter_step(self.model.graph, optimizer, schedule, self.program, everywhere)

        def train_step(
            state: TrainState, batch: GroupedBatch
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            return step(state, self.model.params, batch, dropout_N)

        return state, train_step

    def train(self, output: Path) -> dict[str, ModelAdapter]:
        """The trained adapters by name, from the newest checkpoint in ``output`` where there is one.

        Raises:
            NonFiniteLossError: training diverged.
            InterruptedRun: the run was asked to end.
        """
        options = self.options
        state, train_step = self.start()
        work = Work(
            train_step,
            self.batch_at,
            tokens_per_batch=options.batch_size * options.seq_len,
            evaluate=self.evaluator() if self.validation else None,
            describe=self.log_line,
            blame=self.blame,
        )
        loop = LoopOptions(
            steps=options.steps, save_seconds=float("inf"), save_every=options.save_every,
            evaluate_every=options.eval_every, evaluate_first=True, keep=options.keep,
        )  # fmt: skip
        state = run_loop(state, work, output, loop, self.interrupt)
        return {
            name: dataclasses.replace(
                adapter, layers=jax.tree.map(lambda leaf, n=number: leaf[n], state.params)
            )
            for number, (name, adapter) in enumerate(self.fresh.items())
        }

    @property
    def _everywhere(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def _check(self) -> None:
        if jax.process_count() == 1:  # Else all of them end together, between two steps.
            self.interrupt.check("in a validation")

    def batch_at(self, number: int) -> GroupedBatch:
        """Batch ``number``, each adapter's rows from its own data, on the devices."""
        options = self.options
        own = [
            packed.batch(number, options.rows, options.seq_len, options.seed)
            for packed in self.training.values()
        ]
        return _place(group(own), self.mesh)

    def blame(self, number: int, entry: int) -> str:
        """The adapter of an entry of the measures, and the documents it had in batch ``number``."""
        options, name = self.options, list(self.training)[entry]
        documents = self.training[name].documents_of(
            number, options.rows, options.seq_len, options.seed
        )
        return f"adapter {name}, batch of {', '.join(documents)}"

    def log_line(self, measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The means over the adapters; with several, ``losses`` has each one's own."""
        line = {name: float(np.mean(value)) for name, value in measured.items()}
        if len(self.training) == 1:
            return line
        losses = dict(zip(self.training, map(float, measured["loss"]), strict=True))
        return line | {"losses": losses}

    def evaluator(self) -> Evaluator:
        """Measures the adapters on their validation data."""
        return Evaluator(
            scorer=make_scorer(self.model.graph, self.program, self._everywhere),
            base=self.model.params,
            data=self.validation,
            names=tuple(self.training),
            length=self.options.seq_len,
            rows=self.options.rows,
            most=self.options.eval_windows,
            piece_bytes=self.piece_bytes,
            place=lambda batch: _place(batch, self.mesh),
            check=self._check,
        )


def _silent(message: str) -> None:
    """What the other processes say the first one says."""


def _over_all_devices(options: TrainOptions) -> TrainOptions:
    """With several processes the rows go over all their devices where the options have no mesh.

    Raises:
        InputError: there are not as many rows, or the mesh leaves devices out.
    """
    processes, count = jax.process_count(), jax.device_count()
    if processes == 1:
        return options
    if options.mesh is None:
        return make_options(options.model_dump() | {"mesh": f"data={count}"})
    data, tensor = options.devices()
    if data * tensor != count:
        raise InputError(
            f"mesh {options.mesh} has {data * tensor} devices, expected all {count} of the "
            f"{processes} processes"
        )
    return options


def _open(options: TrainOptions) -> Opened:
    """The base without its weights, once the options are known to fit it."""
    base = open_checkpoint(options.model)
    config = base.config
    if options.seq_len > config.n_positions:
        raise InputError(
            f"seq_len is {options.seq_len}, the model's context has {positions_in_words(config)}"
        )
    check_rank(options.rank, config.projections(), _targets(options, config))
    base.text_tokens("training")
    return base


def _read(
    options: TrainOptions,
    base: Opened,
    cache: Path | None,
    leave_out: tuple[Path, ...],
    interrupt: Interrupt,
) -> tuple[Tokenized, Tokenized]:
    """The data of training and of validation by adapter, each long enough to learn from."""
    found: list[dict[str, tuple[PackedTokens, list[str]]]] = []
    with tokenizing() as show:

        def watch(documents: int, size: int) -> None:
            interrupt.check()
            show(documents, size)

        for split, paths in (("data", options.data), ("validation", options.validation)):
            found.append({})
            for name, path in paths.items():
                interrupt.check()
                packed, skipped = tokenize(
                    path, base.tokenizer, base.config.eos_token_ids[0], cache=cache, watch=watch,
                    column=options.text_column, max_corrupt=options.max_corrupt, leave_out=leave_out,
                )  # fmt: skip
                try:
                    packed.windows(options.seq_len)
                except InputError as error:
                    raise InputError(f"{split} {name}={path}: {error}") from None
                found[-1][name] = packed, skipped
    return found[0], found[1]


def adapter_key(seed: int, name: str) -> jax.Array:
    """Depends on the adapter's own name, so that the others of a run do not change how it starts."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def _targets(options: TrainOptions, config: ModelConfig) -> tuple[str, ...]:
    """The projections that are adapted; PEFT's for LoRA where the options have none."""
    projections = config.projections()
    names = options.targets or projections.names.default_targets("lora")
    return match_targets(names, projections)


def _fresh(options: TrainOptions, model: Model, key: jax.Array) -> ModelAdapter:
    config, own = model.config, TRAITS[options.kind].options
    adapter = init_adapter(
        key, options.kind, config.projections(), config.n_layer, rank=options.rank,
        targets=_targets(options, config), weights=model.weight,
        **{option.name: getattr(options, option.name) for option in own if option.at_start},
    )  # fmt: skip
    settings = {o.setting: getattr(options, o.name) for o in own if o.setting is not None}
    settings["task_type"] = "CAUSAL_LM"
    return dataclasses.replace(adapter, settings=settings)


def _mesh(options: TrainOptions) -> Mesh | None:
    data, tensor = options.devices()
    if options.mesh is None:
        return None
    if data * tensor > jax.device_count():
        raise InputError(
            f"mesh {options.mesh} needs {data * tensor} devices, found {jax.device_count()}"
        )
    return make_mesh(data, tensor)


def _place(batch: GroupedBatch, mesh: Mesh | None) -> GroupedBatch:
    """Rows over the mesh's axis "data". Every process has the whole batch, and keeps its devices'."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(rows, leaf, leaf.shape), batch
    )
