"""What a serving benchmark runs: a base model, random adapters, and an engine that is warmed up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from flora_jax import terminal
from flora_jax.adapters.model_adapter import (
    ModelAdapter,
    abstract_adapter,
    randomise,
)
from flora_jax.adapters.projections import match_targets
from flora_jax.adapters.registry import TRAITS
from flora_jax.bench.serving.drive import run_latency, run_throughput
from flora_jax.bench.serving.workload import (
    Workload,
    WorkloadOptions,
    adapter_names,
    longest,
    make_workload,
)
from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.errors import InputError
from flora_jax.models.family import ModelConfig, presets, with_positions
from flora_jax.models.model import Model, init_model
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Request

# What else a line can be about, and the kind of its adapters.
_OTHERS = {"none": None, "sequential": "flora", "unmerged": "flora"}
KINDS = (*TRAITS, *_OTHERS)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Contender:
    """What a line of the results is about: adapters of a kind and rank on some projections.

    "none" is the base alone. "sequential" is the paper's other baseline, adapters served one after
    another: FLoRA adapters, of which the engine runs one at a time, with all of its requests that have
    arrived; if every request has its own, that is a batch of one. The adapter stays factored, as the
    engine serves it: a server that merges each into a copy of the weights instead saves the factors'
    cost (at rank 1 none) and pays for the merge, which is another pass over all weights a request.
    "unmerged" is FLoRA by the paper's formula (Eq. 6) in prompts too, where the engine builds ``W_i``.

    ``targets`` are PEFT's for LoRA where there are none.

    Raises:
        InputError: an unknown kind, or a rank that the kind cannot have.
    """

    kind: str
    rank: int = 1
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"--kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.adapter_kind is None:
            expected = None if self.rank == 0 else "0"
        else:
            expected = TRAITS[self.adapter_kind].rank_problem(self.rank)
        if expected is not None:
            raise InputError(f"--rank is {self.rank}, expected {expected} with --kind {self.kind}")

    def targets_of(self, config: ModelConfig) -> tuple[str, ...]:
        """The targets as they were given, or PEFT's; ``InputError`` for one that the model lacks."""
        own = config.projections()
        names = self.targets or own.names.default_targets("lora")
        match_targets(names, own)
        return names

    @property
    def adapter_kind(self) -> str | None:
        return _OTHERS.get(self.kind, self.kind)


class Base(NamedTuple):
    """A model's configuration before it is loaded; ``opened`` is ``None`` for random weights."""

    name: str
    config: ModelConfig
    opened: Opened | None


def find_base(model: str | None, preset: str | None) -> Base:
    """The base that is meant, nothing loaded yet.

    Raises:
        InputError: not exactly one of both is given, an unknown preset, or no checkpoint.
    """
    if (model is None) == (preset is None):
        raise InputError(f"MODEL is {model}, --preset is {preset}, expected exactly one of them")
    if preset is not None:
        known = presets()
        if preset not in known:
            raise InputError(f"--preset is {preset!r}, expected one of {', '.join(known)}")
        return Base(preset, known[preset], None)
    opened = open_checkpoint(str(model))
    return Base(opened.directory.name, opened.config, opened)


def plan_workload(base: Base, options: WorkloadOptions, adapted: bool) -> tuple[Workload, Base]:
    """The workload, and the base with room for its longest request.

    A preset gets as many positions as it needs, since its weights are random anyway.

    Raises:
        InputError: a request longer than a checkpoint's context; see also ``make_workload``.
    """
    config = base.config
    names = adapter_names(options) if adapted else []
    workload = make_workload(options, config.vocab_size, config.eos_token_ids, names)
    most = longest(workload.requests)
    if most > config.n_positions:
        if base.opened is not None:
            raise InputError(
                f"--max-total is {options.max_total}, and the longest request has {most} tokens, "
                f"expected at most the {config.n_positions} positions of {base.opened.directory}"
            )
        base = base._replace(config=with_positions(config, most))
    return workload, base


def load_base(base: Base, dtype: str | None, seed: int = 0) -> Model:
    """The checkpoint in ``dtype`` (``None``: its own), or random weights (``None``: float32)."""
    if base.opened is not None:
        return base.opened.load(dtype)
    return init_model(base.config, seed, dtype or "float32")


def make_adapters(
    config: ModelConfig,
    contender: Contender,
    names: Sequence[str],
    seed: int = 0,
    contents: int | None = None,
) -> dict[str, ModelAdapter]:
    """Random adapters far from the identity, a different one for every name; none for "none".

    With ``contents`` they repeat after so many, and share memory: no product takes longer or shorter for
    that, and each name is loaded by itself all the same.
    """
    if contender.adapter_kind is None:
        return {}
    shapes = abstract_adapter(
        contender.adapter_kind, config.projections(), config.n_layer,
        rank=contender.rank, targets=match_targets(contender.targets_of(config), config.projections()),
    )  # fmt: skip
    made = [
        randomise(shapes, seed + number)
        for number in range(min(len(names), contents or len(names)))
    ]
    return {name: made[number % len(made)] for number, name in enumerate(names)}


def start_engine(
    model: Model,
    adapters: Mapping[str, ModelAdapter],
    options: EngineOptions,
    on_compile: Progress | None = None,
) -> Engine:
    """An engine that has compiled everything.

    All adapters lie on the device already, unless ``resident_adapters`` says that there is room for
    fewer: then it starts without any there, and loads them as they are asked for.
    """
    names = list(adapters)
    first = names[: options.resident_adapters]
    engine = Engine(model, {name: adapters[name] for name in first}, options=options)
    for name in names[len(first) :]:
        engine.register(name, adapters[name])
    engine.warm_up(on_compile)
    if options.resident_adapters is None:
        engine.preload(names)
    return engine


def rehearse(engine: Engine, requests: Sequence[Request]) -> None:
    """Runs requests like the first two for some tokens, untimed: a first run touches memory anew."""
    for request in requests[:2]:
        params = request.sampling_params
        params = dataclasses.replace(params, max_tokens=min(4, params.max_tokens))
        # Not the same prompts: the cache would have them when they are measured.
        other = request.prompt_token_ids[::-1]
        engine.add(dataclasses.replace(request, prompt_token_ids=other, sampling_params=params))
    while engine.has_work:
        engine.wait()
        engine.step()


@contextmanager
def running(
    model: Model,
    contender: Contender,
    workload: Workload,
    options: EngineOptions,
    seed: int = 0,
    on_compile: Progress | None = None,
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """A rehearsed engine for a contender, closed at the end, and the beginning of its result line.

    With ``resident_adapters`` there are no more different contents than that: a thousand adapters of a
    large model would fill the host.
    """
    names, resident = workload.adapters, options.resident_adapters
    adapters = make_adapters(model.config, contender, names, seed, resident)
    if contender.kind == "unmerged":
        options = dataclasses.replace(options, merge_prompts=False)
    began = time.perf_counter()
    engine = start_engine(model, adapters, options, on_compile)
    with engine:
        rehearse(engine, workload.requests)
        line = {
            "kind": contender.kind,
            "rank": contender.rank,
            "targets": list(contender.targets_of(engine.model.config)) if adapters else [],
            "adapters": len({request.adapter for request in workload.requests} - {None}),
            "adapter_bytes": next(iter(adapters.values())).bytes() if adapters else 0,
            "merge_prompts": options.merge_prompts,
            "warm_up_s": time.perf_counter() - began,
        }
        yield engine, line


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is asked of a contender: ``benchmark`` is "throughput" or "latency", under a workload.

    ``asked`` goes to :func:`~flora_jax.bench.serving.drive.run_latency`.
    """

    benchmark: str
    workload: Workload
    engine: EngineOptions
    seed: int = 0
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def measure(model: Model, contender: Contender, measured: Measured) -> dict[str, Any]:
    """One result line, with bars for what is compiled and for the requests that have ended.

    Raises:
        InputError: options that no engine can have.
        RunError: no request completed.
    """
    one = contender.kind == "sequential"
    workload = measured.workload
    name = f"{contender.kind} {contender.rank}"
    with (
        bars(name, len(workload.requests)) as (on_compile, on_end),
        running(model, contender, workload, measured.engine, measured.seed, on_compile) as (
            engine, line,
        ),
    ):  # fmt: skip
        requests = workload.requests
        if measured.benchmark == "throughput":
            found = run_throughput(engine, requests, one_adapter_at_a_time=one, on_end=on_end)
        else:
            found = run_latency(
                engine, requests, workload.arrivals_s, one_adapter_at_a_time=one, on_end=on_end,
                **measured.asked,
            )  # fmt: skip
    return line | found


def engine_options(requests: Sequence[Request], **given: Any) -> EngineOptions:
    """The engine's options, with room for the longest request in every row; ``None`` is a default.

    Raises:
        InputError: options that no engine can have.
    """
    values = {name: value for name, value in given.items() if value is not None}
    return EngineOptions(**({"max_model_len": longest(requests)} | values))


@contextmanager
def bars(what: str, requests: int) -> Iterator[tuple[Progress, Callable[[], None]]]:
    """Two bars on standard error, gone at the end: programs compiled, and requests that ended."""
    with terminal.bars() as add:
        compiling, serving = add(f"{what}: compile"), add(f"{what}: requests", requests)
        yield lambda name, done, total: compiling.show(done, total, name), serving.advance


def describe_run(
    benchmark: str,
    base: Base,
    model: Model,
    options: WorkloadOptions,
    workload: Workload,
    engine: EngineOptions,
) -> dict[str, Any]:
    """What a result file says beside its lines."""
    requests = workload.requests
    lengths = {
        "mean_input_tokens": sum(len(request.prompt_token_ids) for request in requests)
        / len(requests),
        "mean_output_tokens": sum(request.sampling_params.max_tokens for request in requests)
        / len(requests),
        "longest": longest(requests),
    }
    if workload.file_rows is not None:
        read, kept = workload.file_rows
        lengths |= {"lengths_rows": read, "lengths_rows_kept": kept}
    return {
        "benchmark": benchmark,
        "model": base.name,
        "weights": "random" if base.opened is None else "checkpoint",
        "positions": base.config.n_positions,
        "dtype": str(model.embedding.dtype),
        "workload": options.to_dict() | lengths,
        "engine": dataclasses.asdict(engine),
    }
