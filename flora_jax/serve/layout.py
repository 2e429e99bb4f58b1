"""How long an engine's sequences and how large its adapter pool are: what its options, its model and its
first adapters make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_jax.adapters.projections import match_targets
from flora_jax.errors import InputError
from flora_jax.mixing.bank import Count, Prepared, most_of, room_for, sum_of
from flora_jax.models.family import ModelConfig
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.pool import AdapterPool
from flora_jax.serve.request import MAX_STOP_TOKENS
from flora_jax.serve.state import MAX_STOPS
from flora_jax.serve.versions import Version


def longest_sequence(config: ModelConfig, options: EngineOptions) -> int:
    """Positions of the longest sequence, prompt and output together.

    Raises:
        InputError: the model has fewer, or more end tokens than are looked for.
    """
    most = MAX_STOPS - MAX_STOP_TOKENS
    if len(config.eos_token_ids) > most:
        raise InputError(f"the model has {len(config.eos_token_ids)} end tokens, at most {most}")
    context = options.max_model_len or config.n_positions
    if context > config.n_positions:
        raise InputError(
            f"max_model_len is {context}, the model has {config.n_positions} positions"
        )
    return context


def make_pool(
    first: Mapping[Version, Prepared],
    config: ModelConfig,
    options: EngineOptions,
    additive: Any = "float32",
) -> AdapterPool:
    """A pool that knows these adapters, with room for all of them on the device, or for as many of the
    largest as the options say. ``additive`` is the dtype of its additive vectors.

    Raises:
        InputError: targets without anything that says how many components they may have.
    """
    prepared = list(first.values())
    most, room = most_of(prepared), sum_of(prepared)
    more = options.max_components
    if more is not None:
        for target in {*most, *match_targets(options.targets, config.projections())}:
            known = most.get(target, Count(1, 0, 0))
            most[target] = Count(max(more, known[0]), max(more, known[1]), 1)
    elif options.targets:
        if not most:
            raise InputError(
                f"targets are {', '.join(options.targets)} and max_components is None, expected a "
                "number where no adapter is there at the start"
            )
        largest = Count(*map(max, zip(*most.values())))
        most = dict.fromkeys(match_targets(options.targets, config.projections()), largest) | most
    number = options.resident_adapters
    if number is not None or more is not None or options.targets:
        number = number or max(len(prepared), options.max_num_seqs)
        room = room_for(most, number)
    targets = [target for target in config.projections() if target in most]
    pool = AdapterPool(
        config,
        {target: room[target] for target in targets},
        {target: most[target] for target in targets},
        options.host_adapter_bytes,
        additive,
    )
    for version, own in first.items():
        pool.register(version.name, version.source)
        pool.add_ready(version, own)
    return pool


def target_groups(first: Mapping[Version, Prepared]) -> list[tuple[str, ...]]:
    """The sets of targets that the adapters have."""
    return [tuple(own.counts) for own in first.values()]
