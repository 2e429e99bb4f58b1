"""The table of adapter kinds: a line for each, with what is known of it before JAX is there.

A kind's name is also that of its two modules: ``adapters/<name>.py`` has its arithmetic (``KIND``),
``peft/formats/<name>.py`` its folder (``FORMAT``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Option(NamedTuple):
    """A choice that only some kinds leave to whoever trains one.

    Args:
        name: as in ``flora-jax train``.
        default: its value at a rank, ``None`` for one that is left out.
        choices: all values, of an option that is one of a few words.
        least_rank: the smallest rank of a value that cannot have all.
        at_start: whether the kind's ``init`` takes it.
        setting: the field of adapter_config.json that keeps it, where no other follows from it.
        rates: the peak learning rates of values that want another than the kind's.
    """

    name: str
    default: Callable[[int], Any] = lambda rank: None
    choices: tuple[str, ...] = ()
    least_rank: Mapping[str, int] = MappingProxyType({})
    at_start: bool = True
    setting: str | None = None
    rates: Mapping[str, float] = MappingProxyType({})


class Traits(NamedTuple):
    """What a kind is, apart from its arithmetic.

    Args:
        name: lower case.
        pairs: the numbers of multiplicative and additive rank-1 components at a rank.
        learning_rate: the peak that training has by default, see :meth:`rate`.
        options: see :class:`Option`.
        fixed_rank: the only rank there is.
        scales_bias: whether an adapter on a projection's output scales the bias as well.
        from_others: whether an adapter of another kind can become one, see :func:`convertible`.
    """

    name: str
    pairs: Callable[[int], tuple[int, int]]
    learning_rate: float
    options: tuple[Option, ...] = ()
    fixed_rank: int | None = None
    scales_bias: bool = False
    from_others: bool = True

    def rank(self, wanted: int) -> int:
        """The rank that an adapter of this kind gets where ``wanted`` is asked for of all kinds."""
        return wanted if self.fixed_rank is None else self.fixed_rank

    def rate(self, value_of: Callable[[str], Any]) -> float:
        """The peak learning rate by default, where ``value_of`` gives the options' values by name."""
        own = (option.rates.get(value_of(option.name)) for option in self.options)
        return next((rate for rate in own if rate is not None), self.learning_rate)

    def rank_problem(self, rank: int) -> str | None:
        """What a message says of a rank that the kind cannot have: what was expected instead."""
        if self.fixed_rank is None:
            return None if rank >= 1 else "at least 1"
        return None if rank == self.fixed_rank else f"{self.fixed_rank}"


_ALPHA = Option("alpha", float)
_DROPOUT = Option("dropout", lambda rank: 0.0, at_start=False, setting="lora_dropout")
_INIT = Option(
    "init", lambda rank: "zero_sum", ("zero_sum", "ones", "frozen_ones"),
    least_rank={"frozen_ones": 2}, setting="init", rates={"frozen_ones": 6.4e-2},
)  # fmt: skip
_REDUCTION = Option("reduction", lambda rank: "mean", ("mean", "sum"))

# Learning rates are those of the paper's section 4 for all that it trains. HiRA starts like LoRA but
# multiplies, so that its factors must move about as far as FLoRA's. FLoRA from a frozen first component
# does too, and its mean divides what they do: 8 times the rate was best on one model, 16 on another.
TRAITS: Mapping[str, Traits] = {
    traits.name: traits
    for traits in (
        Traits("lora", lambda rank: (1, rank), 1e-4, (_ALPHA, _DROPOUT)),
        Traits("flora", lambda rank: (rank, 0), 8e-3, (_INIT, _REDUCTION)),
        Traits("ia3", lambda rank: (1, 0), 5e-3, fixed_rank=1, scales_bias=True, from_others=False),
        Traits("hira", lambda rank: (rank + 1, 0), 8e-3),
        Traits("dora", lambda rank: (1, rank), 1e-4, (_ALPHA, _DROPOUT)),
    )
}


def convertible() -> tuple[str, ...]:
    """The names of the kinds that adapters of others can become."""
    return tuple(traits.name for traits in TRAITS.values() if traits.from_others)


def owners(option: str) -> tuple[str, ...]:
    """The names of the kinds that have an option."""
    return tuple(t.name for t in TRAITS.values() if any(o.name == option for o in t.options))


def options() -> dict[str, Option]:
    """Every option of every kind, by name."""
    return {option.name: option for traits in TRAITS.values() for option in traits.options}
