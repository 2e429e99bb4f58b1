"""Random adapters of every kind, far from the identity."""

from flora_jax.adapters.model_adapter import abstract_adapter, randomise
from flora_jax.adapters.projections import Projections
from flora_jax.adapters.registry import TRAITS
from flora_jax.models.starcoder.config import NAMES

KINDS = ("lora", "flora", "ia3", "hira")


def projections_of(widths):
    """Projections of these widths, named as StarCoder's."""
    return Projections(widths, NAMES)


def random_adapter(kind, seed, projections, layers=1, rank=1, targets=("attn.c_attn",), **options):
    """A ``ModelAdapter`` with random factors; the rank is 1 for IA3 whatever is asked for.

    ``projections`` are a model's, or widths alone.
    """
    if not isinstance(projections, Projections):
        projections = projections_of(projections)
    rank = TRAITS[kind].rank(rank)
    shapes = abstract_adapter(kind, projections, layers, rank=rank, targets=targets, **options)
    return randomise(shapes, seed)


def random_projection(kind, seed, inputs, outputs, rank, **options):
    """The same for one projection: the kind's own dataclass."""
    projections = projections_of({"attn.c_attn": (inputs, outputs)})
    if kind == "ia3" and options.pop("side", "output") == "input":
        options["feedforward"] = ("attn.c_attn",)
    adapter = random_adapter(kind, seed, projections, rank=rank, **options)
    return adapter.layers[0]["attn.c_attn"]
