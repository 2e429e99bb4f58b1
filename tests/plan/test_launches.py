"""Counting launches and copies: small programs by hand, and XLA's own list of thunks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flora_jax.errors import InputError
from flora_jax.plan import ahead
from flora_jax.plan.launches import Program

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_transpose (p: f16[64,32]) -> f16[32,64] {
  %p = f16[64,32]{1,0} parameter(0)
  ROOT %transpose.1 = f16[32,64]{1,0} transpose(%p), dimensions={1,0}
}

%inner (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%a), index=1
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %gemm = (f32[8]{0}, s8[4]{0}) custom-call(%fusion.1), custom_call_target="__cublas$lt$matmul"
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%x, %x)
}

%inner_condition (a.1: (s32[], f32[8])) -> pred[] {
  %a.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%a.1), kind=kLoop, calls=%fused
}

%outer (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %bitcast.9 = f32[8]{0} bitcast(%b)
  %while.1 = (s32[], f32[8]{0}) while(%b), condition=%inner_condition, body=%inner, BACKEND
  ROOT %copy.2 = (s32[], f32[8]{0}) copy(%while.1)
}

%few (c: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} parameter(0)
}

%many (d: f32[8]) -> f32[8] {
  %d = f32[8]{0} parameter(0)
  %sort.1 = f32[8]{0} sort(%d), to_apply=%few
  ROOT %negate.1 = f32[8]{0} fusion(%sort.1), kind=kLoop, calls=%fused
}

ENTRY %main (w: f16[64,32], y: f32[8]) -> f32[8] {
  %w = f16[64,32]{1,0:T(8)} parameter(0)
  %y = f32[8]{0} parameter(1)
  %constant.1 = f32[] constant(1)
  %turned = f16[32,64]{1,0} fusion(%w), kind=kLoop, calls=%fused_transpose
  %copy.3 = f16[1,64,32]{2,1,0} copy(%w)
  %copy.4 = f16[64,64]{1,0} copy(%w)
  %start = (f32[8]{0}, f32[8]{0}) all-reduce-start(%y), to_apply=%few
  %done = f32[8]{0} all-reduce-done(%start)
  %while.2 = (s32[], f32[8]{0}) while(%y), condition=%inner_condition, body=%outer
  ROOT %conditional.1 = f32[8]{0} conditional(%y, %y, %y), branch_computations={%few, %many}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'


def test_a_program_counts_by_hand():
    program = Program(PROGRAM.replace("BACKEND", KNOWN))
    assert program.launches("inner").total == 2
    # Five trips of two, and a copy; its condition is not asked.
    assert program.launches("outer").total == 11
    whole = program.launches()
    # A fusion, two copies, an all-reduce once, the outer loop once with its condition, the dear branch.
    assert whole.total == 1 + 2 + 1 + (11 + 1) + 2
    assert whole.loops == ("while.2",)
    assert whole.static_loops == 1


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    whole = Program(PROGRAM.replace(", BACKEND", "")).launches()
    assert whole.loops == ("while.2", "while.1")
    assert whole.total == 1 + 2 + 1 + (2 + 1 + 1 + 1) + 2


def test_copies_of_a_weight_are_found_either_way_round():
    program = Program(PROGRAM)
    assert program.copies_of({("f16", (64, 32))}) == ["transpose.1", "copy.3"]
    assert program.copies_of({("f16", (32, 64))}) == ["transpose.1", "copy.3"]
    assert program.copies_of({("bf16", (64, 32)), ("f16", (64, 33))}) == []


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        Program("HloModule nothing")


def needs_compiler():
    try:
        ahead.check_compiler()
        ahead.find_toolkit()
    except InputError as error:
        pytest.skip(str(error))


SCRIPT = """
import jax, jax.numpy as jnp
from jax import lax
from flora_jax.plan import ahead, cards, launches
a = ahead.placed(cards.CARDS["h100"], jax.ShapeDtypeStruct((256, 128), jnp.float16))
b = ahead.placed(cards.CARDS["h100"], jax.ShapeDtypeStruct((128, 128), jnp.float16))
def f(a, b):
    y = lax.fori_loop(0, 5, lambda _, x: jnp.sin(jnp.tanh(x @ b) @ b), a)
    return jnp.sort(y.T @ a, axis=0) * b.T
print(launches.Program(ahead.compile_lowered(lambda: jax.jit(f).lower(a, b)).text).launches().total)
"""


def thunks(lines):
    """Launches of XLA's printed thunk list: what is no control flow, in a loop of five times five."""
    total, inside = 0, None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if inside is not None and line.strip() in ("condition:", "body:"):
            part = line.strip()
            continue
        if inside is not None and indent <= inside:
            inside = None
        found = re.match(r"\s*\d+: (k\w+)", line)
        if found is None:
            continue
        if found[1] == "kWhile":
            inside, part = indent, ""
        else:
            total += 1 if inside is None else 5 * (part == "body:")
    return total


def test_the_count_is_xlas_own_list_of_thunks(tmp_path):
    needs_compiler()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_dump_to={tmp_path}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    (listed,) = tmp_path.glob("*jit_f.thunk_sequence.txt")
    own = thunks(listed.read_text().splitlines())
    assert own > 25
    assert int(done.stdout) == own


def test_a_missing_compiler_is_one_clear_error(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"ptxas and libdevice.*flora-jax\[plan\]"):
        ahead.find_toolkit(iter([tmp_path, tmp_path / "nowhere"]))
    monkeypatch.setattr(ahead, "_PACKAGE", "jax-cuda13-nothing")
    with pytest.raises(InputError, match=r"needs jax-cuda13-nothing.*flora-jax\[plan\]"):
        ahead.check_compiler()


def test_a_compiler_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(ahead, "_PLUGIN", "flora_jax.plan")
    monkeypatch.setattr(ahead, "_PACKAGE", "numpy")
    with pytest.raises(InputError, match=r"numpy is .*, expected jaxlib's version"):
        ahead.check_compiler()


def test_a_toolkit_is_found_where_it_lies(tmp_path):
    for file in ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc"):
        path = tmp_path / "cuda" / file
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    assert tmp_path / "cuda" in ahead.toolkits({"CUDA_HOME": str(tmp_path / "cuda")})
    assert ahead.find_toolkit(iter([tmp_path, tmp_path / "cuda"])) == tmp_path / "cuda"
