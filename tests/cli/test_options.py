"""Command lines as other programs take them."""

import pytest

from flora_jax.cli.options import spelt_out


@pytest.mark.parametrize(
    "given, expected",
    [
        ("x --lora-modules a b --y 1", "x --lora-modules a --lora-modules b --y 1"),
        ("x --lora-modules a --lora-modules b c", "x --lora-modules a --lora-modules b --lora-modules c"),
        ("x --adapter a b", "x --adapter a b"),
        ("x --lora-modules", "x --lora-modules"),
        ("x --lora-modules --y z", "x --lora-modules --y z"),
        ("", ""),
    ],
)  # fmt: skip
def test_an_option_with_several_values_is_given_for_each(given, expected):
    assert spelt_out(given.split(), ["--lora-modules"]) == expected.split()
