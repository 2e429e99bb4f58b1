"""What differs by kind stands in the kind's own files: no other module asks which kind it has."""

import ast
from pathlib import Path

import pytest

from flora_jax.adapters import KINDS, kind_of
from flora_jax.adapters.model_adapter import abstract_adapter
from flora_jax.adapters.registry import TRAITS, convertible
from flora_jax.peft.format import FORMATS
from tests.helpers.random_adapters import projections_of

PACKAGE = Path(__file__).resolve().parents[2] / "flora_jax"
CLASSES = {kind.type.__name__ for kind in KINDS.values()}
OWN = {PACKAGE / "adapters" / f"{name}.py" for name in KINDS}
OWN |= {PACKAGE / "peft" / "formats" / f"{name}.py" for name in KINDS}


def _names_a_kind(node):
    return any(isinstance(part, ast.Constant) and part.value in TRAITS for part in ast.walk(node))


def _names_a_class(node):
    parts = [*ast.walk(node)]
    return any(
        (isinstance(part, ast.Name) and part.id in CLASSES)
        or (isinstance(part, ast.Attribute) and part.attr in CLASSES)
        for part in parts
    )


def questions(source):
    """The lines that ask for a kind: comparisons, ``match`` cases, ``isinstance``, ``issubclass``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asks = (
            (isinstance(node, ast.Compare) and (_names_a_kind(node) or _names_a_class(node)))
            or (isinstance(node, ast.MatchValue) and _names_a_kind(node))
            or (isinstance(node, ast.MatchClass) and _names_a_class(node.cls))
            or (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("isinstance", "issubclass")
                and _names_a_class(node)
            )
        )
        if asks:
            found.append(ast.unparse(node))
    return found


def test_no_module_outside_a_kinds_own_asks_which_kind_it_has():
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in OWN]
    assert len(modules) > 100
    found = {str(path): asked for path in modules if (asked := questions(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'lora': pass",
        "x = 1 if 'ia3' != adapter.kind else 2",
        "x = kind in ('flora', 'hira')",
        "isinstance(params, IA3)",
        "isinstance(params, LoRA | adapters.HiRA)",
        "x = type(params) is FLoRA",
        "match kind:\n    case 'flora': pass",
        "match params:\n    case lora.LoRA(): pass",
    ],
)
def test_a_question_that_is_planted_is_found(source):
    assert len(questions(source)) == 1


def test_words_that_are_no_question_are_left_alone():
    source = (
        "KINDS = ('flora', 'lora')\nx = {'ia3': 1}.get(kind)\nif kind == 'none': pass\nLoRA(a, b)"
    )
    assert questions(source) == []


def test_the_table_says_which_kinds_can_be_made_of_others():
    assert convertible() == tuple(n for n, kind in KINDS.items() if kind.of_components is not None)
    # What has no exact conversion for an adapter has the nearest.
    assert convertible() == tuple(n for n, kind in KINDS.items() if kind.nearest is not None)


@pytest.mark.parametrize("name", TRAITS)
def test_a_kinds_modules_are_found_by_its_name(name):
    kind, own_format = KINDS[name], FORMATS[name]
    assert (kind.name, own_format.kind, kind.traits.name) == (name, name, name)
    rank = kind.traits.rank(2)
    adapter = abstract_adapter(name, projections_of({"attn.c_attn": (6, 4)}), 1, rank=rank)
    params = adapter.layers[0]["attn.c_attn"]
    assert kind_of(params) is kind
    assert kind.rank(params) == rank
    assert {size for _, size in kind.widths(params)} <= {4, 6}
    assert not kind.is_batched(params)
