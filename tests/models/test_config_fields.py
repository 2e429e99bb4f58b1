"""What the families share of reading config.json, on a configuration of no family."""

from __future__ import annotations

import dataclasses

import pytest

from flora_jax.errors import InputError
from flora_jax.models.config_fields import (
    ACTIVATIONS,
    Fields,
    check_choice,
    check_fields,
    check_multiple,
    check_positive,
    located,
    read_fields,
    write_fields,
)


@dataclasses.dataclass(frozen=True)
class Plain:
    model_type: str = "plain"
    width: int = 8
    rate: float = 0.5
    exact: bool = True
    window: int | None = None
    kinds: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = (3,)
    dtype: str = "float32"
    others: tuple = ()


FIELDS = Fields(
    model_types=("plain", "simple"),
    types={"turns": "dict | None", "kinds": "list", "share": "float | None"},
    aliases={"d_model": "width"},
    only={"shape": "round"},
    without_effect=frozenset(("dropout", "colour")),
    kept=("dropout",),
)


def read(**raw):
    return read_fields(Plain, FIELDS, {"model_type": "plain", **raw}, "x.json")


def test_every_value_arrives_under_its_fields_name():
    turns = {"kind": "fast", "factor": 2}
    found = read(
        d_model=4, rate=1, exact=False, window=None, turns=turns, kinds=["a"], share=None,
        shape="round", dropout=0.1, colour="red", torch_dtype="bfloat16", eos_token_id=[1, 2],
        pad_token_id=9, use_cache=True, _name="n", strange=None,
    )  # fmt: skip
    assert found == dict(
        model_type="plain", width=4, rate=1, exact=False, window=None, turns=turns, kinds=["a"],
        share=None, dtype="bfloat16", eos_token_ids=(1, 2),
        others=(("dropout", 0.1), ("pad_token_id", 9)),
    )  # fmt: skip
    assert read_fields(Plain, FIELDS, {"model_type": "simple"}, "")["model_type"] == "simple"


def test_the_end_token_is_one_many_none_or_the_default():
    assert "eos_token_ids" not in read()
    found = [read(eos_token_id=eos)["eos_token_ids"] for eos in (7, [7], [7, 8], [], None)]
    assert found == [(7,), (7,), (7, 8), (), ()]


def test_the_newer_name_of_the_dtype_wins():
    assert read()["dtype"] == "float32"
    assert read(dtype="float16", torch_dtype="bfloat16")["dtype"] == "float16"


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"model_type": "other"}, "model_type is 'other', expected 'plain' or 'simple'"),
        ({"width": "8"}, "width is '8', expected int"),
        ({"width": 8.0}, "width is 8.0, expected int"),
        ({"width": True}, "width is True, expected int"),
        ({"width": None}, "width is None, expected int"),
        ({"rate": True}, "rate is True, expected float"),
        ({"exact": 1}, "exact is 1, expected bool"),
        ({"window": 2.5}, "window is 2.5, expected int | None"),
        ({"turns": [1]}, "turns is [1], expected dict | None"),
        ({"kinds": {"a": 1}}, "kinds is {'a': 1}, expected list"),
        ({"d_model": 4, "width": 5}, "d_model is 4, but width is 5"),
        ({"shape": "square"}, "shape is 'square', only 'round' is supported"),
        ({"is_decoder": True}, "is_decoder is True, only False is supported"),
        ({"b": 1, "a": []}, "fields of unknown effect: a=[], b=1"),
        ({"eos_token_ids": [1]}, "fields of unknown effect: eos_token_ids=[1]"),
        ({"others": [1]}, "fields of unknown effect: others=[1]"),
    ],
)
def test_what_cannot_be_honoured_is_named(raw, message):
    with pytest.raises(InputError) as found:
        read(**raw)
    assert str(found.value) == f"x.json: {message}"


def test_what_was_read_is_written_and_read_again():
    raw = dict(width=4, rate=0.25, kinds=["a"], eos_token_id=5, dropout=0.1, bos_token_id=1)
    config = Plain(**read(**raw))
    written = write_fields(config, "PlainForCausalLM")
    assert written == raw | dict(
        architectures=["PlainForCausalLM"], model_type="plain", exact=True, window=None,
        dtype="float32",
    )  # fmt: skip
    assert Plain(**read(**written)) == config
    several = dataclasses.replace(config, eos_token_ids=(5, 6), others=())
    assert write_fields(several, "")["eos_token_id"] == [5, 6]
    assert write_fields(several, "")["bos_token_id"] == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, "width is 0, expected a positive integer"),
        ({"width": True}, "width is True, expected a positive integer"),
        ({"width": 1 << 20}, "width is 1048576, expected at most 262144"),
        ({"eos_token_ids": (1, -1)}, "eos_token_id is -1, expected token ids"),
        ({"eos_token_ids": ("a",)}, "eos_token_id is 'a', expected token ids"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float32, bfloat16 or float16"),
    ],
)
def test_a_size_a_token_or_a_dtype_that_cannot_be_is_named(changes, message):
    check_fields(Plain(), {"width": "width"})
    with pytest.raises(InputError) as found, located("here"):
        check_fields(Plain(**changes), {"width": "width"})
    assert str(found.value) == f"here: config: {message}"


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: check_multiple("a", 7, "b", 2), "a 7 is not a multiple of b 2"),
        (lambda: check_positive("e", 0.0), "e is 0.0, expected above 0"),
        (lambda: check_positive("e", float("nan")), "e is nan, expected above 0"),
        (lambda: check_choice("c", 3, (1, 2)), "c is 3, expected one of 1, 2"),
    ],
)
def test_each_check_names_the_field(check, message):
    with pytest.raises(InputError, match=f"config: {message}"):
        check()


def test_every_activation_that_a_configuration_may_name_is_there():
    from flora_jax.models import layers

    assert set(layers.ACTIVATIONS) == set(ACTIVATIONS)
