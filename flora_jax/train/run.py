"""One fine-tuning run from its options to adapter folders, resumable at any moment.

Ties the data, the step and the loop to a directory; knows nothing of the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.adapters.model_adapter import ModelAdapter, init_adapter
from flora_jax.adapters.projections import match_targets
from flora_jax.adapters.registry import TRAITS
from flora_jax.checkpoints import open_checkpoint
from flora_jax.errors import InputError
from flora_jax.models.family import ModelConfig
from flora_jax.models.model import Model
from flora_jax.models.sharding import make_mesh
from flora_jax.train.adapt import (
    GroupedBatch,
    StepOptions,
    group,
    init_adapter_state,
    make_adapter_step,
    make_optimizer,
    make_scorer,
)
from flora_jax.train.choice import choose
from flora_jax.train.data.tokens import piece_bytes, tokenize, tokenizing
from flora_jax.train.directory import (
    check_directory,
    claim_directory,
    is_finished,
    report_data,
)
from flora_jax.train.evaluation import Evaluator
from flora_jax.train.loop import LoopOptions, run_loop
from flora_jax.train.options import TrainOptions
from flora_jax.train.results import write_results
from flora_jax.train.step import warmup_then


def train(
    options: TrainOptions,
    output: Path,
    *,
    resume: bool = False,
    source: str | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Trains one adapter for each entry of ``options.data``; their folders by name.

    Args:
        options: of the run; saved as ``output/config.json``.
        output: new or empty, or with ``resume`` the directory of a run with the same options.
        resume: go on from the newest checkpoint, or start where there is none.
        source: where the model is, if not at ``options.model``.
        cache: where tokenised data is kept between runs.
        say: takes notes for the user, a line each.

    Raises:
        InputError: anything in the options, the data or the model that does not fit.
        NonFiniteLossError: training diverged.
    """
    options = options.effective(jax.default_backend())
    check_directory(options, output, resume)
    folders = {name: output / name for name in options.data}
    if is_finished(options, output):
        say(f"{output}: this run is finished, nothing to do")
        return folders
    opened = open_checkpoint(source or options.model)
    directory, config = opened.directory, opened.config
    if options.seq_len > config.n_positions:
        raise InputError(
            f"seq_len is {options.seq_len}, the model's context has {config.n_positions} positions"
        )
    _targets(options, config)
    mesh = _mesh(options)
    tokenizer = opened.tokenizer
    if tokenizer is None or not config.eos_token_ids:
        raise InputError(f"{directory}: training needs tokenizer.json and an end token")
    if (end_id := config.eos_token_ids[0]) >= config.vocab_size:
        raise InputError(
            f"{directory / 'config.json'}: eos_token_id is {end_id}, expected below the vocabulary's "
            f"{config.vocab_size}"
        )
    prepare = functools.partial(
        tokenize, tokenizer=tokenizer, end_id=end_id, cache=cache,
        column=options.text_column, max_corrupt=options.max_corrupt,
    )  # fmt: skip
    with tokenizing() as watch:
        training = {name: prepare(path, progress=watch) for name, path in options.data.items()}
        validation = {
            name: prepare(path, progress=watch) for name, path in options.validation.items()
        }
    for split, paths, data in (
        ("data", options.data, training), ("validation", options.validation, validation)
    ):  # fmt: skip
        for name, (packed_tokens, _) in data.items():
            try:
                packed_tokens.windows(options.seq_len)
            except InputError as error:
                raise InputError(f"{split} {name}={paths[name]}: {error}") from None
    quantize = None if options.quantize == "none" else options.quantize
    model = opened.load(options.dtype, mesh=mesh, quantize=quantize)
    claim_directory(options, output, training, validation, model.params)
    report_data(training, validation, say)

    schedule = warmup_then(options.schedule, options.rate, options.steps, options.warmup)
    optimizer = make_optimizer(schedule, clip=options.clip, weight_decay=options.weight_decay)
    keys = {name: adapter_key(options.seed, name) for name in options.data}
    fresh = [_fresh(options, model, key) for key in keys.values()]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.layers for one in fresh))
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(layers, optimizer)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    if everywhere is not None:
        state = jax.device_put(state, everywhere)
    dropout_N = jnp.stack([jax.random.fold_in(key, 1) for key in keys.values()])
    program = choose(
        StepOptions(options.accumulate, options.remat, options.dropout), config, options.dtype,
        options.seq_len, say, heads_split=options.devices()[1] > 1,
    )  # fmt: skip
    step = make_adapter_step(model.graph, optimizer, schedule, program, everywhere)
    place = functools.partial(_place, mesh=mesh)
    packed = {name: found for name, (found, _) in training.items()}
    evaluator = Evaluator(
        make_scorer(model.graph, program), model.params,
        {name: found for name, (found, _) in validation.items()},
        tuple(options.data), options.seq_len, options.rows, options.eval_windows,
        piece_bytes(tokenizer, config.vocab_size), place,
    )  # fmt: skip

    def batch_at(number: int) -> GroupedBatch:
        own = [
            found.batch(number, options.rows, options.seq_len, options.seed)
            for found in packed.values()
        ]
        return place(group(own))

    def blame(number: int, entry: int) -> str:
        name = list(packed)[entry]
        documents = packed[name].documents_of(number, options.rows, options.seq_len, options.seed)
        return f"adapter {name}, batch of {', '.join(documents)}"

    def log_line(measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
        line = {name: float(np.mean(value)) for name, value in measured.items()}
        if len(packed) == 1:
            return line
        losses = dict(zip(packed, map(float, measured["loss"]), strict=True))
        return line | {"losses": losses}

    state = run_loop(
        state,
        lambda state, batch: step(state, model.params, batch, dropout_N),
        batch_at,
        output,
        LoopOptions(
            steps=options.steps, save_seconds=float("inf"), save_every=options.save_every,
            evaluate_every=options.eval_every, evaluate_first=True, keep=options.keep,
        ),
        tokens_per_batch=options.batch_size * options.seq_len,
        evaluate=evaluator if validation else None,
        describe=log_line,
        blame=blame,
    )  # fmt: skip
    adapters = {
        name: dataclasses.replace(
            fresh[number], layers=jax.tree.map(lambda leaf, n=number: leaf[n], state.params)
        )
        for number, name in enumerate(packed)
    }
    write_results(options, output, adapters, folders)
    return folders


def adapter_key(seed: int, name: str) -> jax.Array:
    """Depends on the adapter's own name, so that its company does not change how it starts."""
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


def _place(batch: GroupedBatch, *, mesh: Mesh | None) -> GroupedBatch:
    """Rows over the mesh's axis "data". Every process has the whole batch, and keeps its devices'."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(rows, leaf, leaf.shape), batch
    )
