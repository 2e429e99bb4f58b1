"""What a training step makes an H100 do, counted on the program that XLA compiles for it; nothing runs.

``python -m experiments.gpu_counts_train --preset 1b --kind lora flora --rank 8 --adapters 1 8`` compiles
the step at 2 and at 4 layers; half of the difference is a layer's: launches, bytes moved, temporaries
and a modelled time. Needs the extra ``plan``.

A kernel moves its operands and its results once. A product takes the longer of its bytes and of its
operations, at 600 TFLOP/s of 16-bit arrays and 300 of float32 ones (TF32), every other kernel its bytes
at 3.0 TB/s, flash attention its operations (half of the square is masked; backward 2.5 times forward) at
400 TFLOP/s, and each launch 2 µs on top. XLA may count a kernel's operand whole of which it reads a part:
the embedding's, the head's; both are outside of the layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from flora_jax.adapters.model_adapter import init_adapter
from flora_jax.models.model import abstract_model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan.ahead import Compiled, compile_lowered, placed
from flora_jax.plan.cards import CARDS
from flora_jax.plan.launches import Instruction, Program
from flora_jax.platforms import CPU, GPU
from flora_jax.train.loss import HeadChunks
from flora_jax.train.step import GroupedBatch, StepOptions, init_adapter_state, make_adapter_step

ROWS, LENGTH = 8, 512
BANDWIDTH, HALF_RATE, WIDE_RATE, FLASH_RATE, LAUNCH = 3.0e12, 600e12, 300e12, 400e12, 2e-6
CUDNN_VERSION = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
MATMUL, FLASH = "__cublas", "__cudnn$fmha"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
# Instructions that launch nothing.
VIEWS = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota"}
OPTIONS = {
    "cpu's": StepOptions(head=HeadChunks(CPU.head_numbers, CPU.even_head_chunks)),
    "gpu's": StepOptions(
        attention=GPU.training_attention,
        rounded=GPU.rounded_results,
        head=HeadChunks(GPU.head_numbers, GPU.even_head_chunks),
    ),
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of a program or of a layer; ``products`` are operations by the arrays' bits."""

    launches: float
    bytes: float
    half_products: float
    wide_products: float
    temporaries: float
    seconds: float

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def share(self, parts: float) -> Counts:
        return Counts(*(value / parts for value in self.values()))

    def values(self) -> tuple[float, ...]:
        return dataclasses.astuple(self)


def compile_step(
    preset: str, layers: int, kind: str, rank: int, adapters: int, options: StepOptions
) -> Compiled:
    """The step of ``adapters`` on ``ROWS`` rows in bfloat16, compiled for an H100.

    Raises:
        InputError: there is no compiler for it.
    """
    config = dataclasses.replace(PRESETS[preset], n_layer=layers, dtype="bfloat16")
    model = abstract_model(config, jnp.bfloat16)
    optimizer = optax.adamw(1e-3, weight_decay=0.01)

    def start(key: jax.Array) -> Any:
        one = init_adapter(key, kind, config.projections(), layers, rank=rank).layers
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * adapters), one)

    with jax.numpy_dtype_promotion("standard"):
        stacked = jax.eval_shape(start, jax.random.key(0))
        state = jax.eval_shape(lambda layers: init_adapter_state(layers, optimizer), stacked)
    step: Any = make_adapter_step(model.graph, optimizer, optax.constant_schedule(1e-3), options)
    rows = ROWS // adapters

    def array(length: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, adapters, length), dtype)

    batch = GroupedBatch(
        array(LENGTH + 1, jnp.int32), array(LENGTH, jnp.int32), array(LENGTH, jnp.int32),
        array(LENGTH, jnp.float32),
    )  # fmt: skip
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), adapters))
    arguments = placed(CARDS["h100"], (state, model.params, batch, keys))
    # There is no cuDNN here to say its version; the card's description says this one.
    with mock.patch(CUDNN_VERSION, return_value=91200):
        return compile_lowered(lambda: step.lower(*arguments))


def kernels(program: Program, name: str | None = None, times: int = 1) -> Iterator[Any]:
    """``(instruction, bytes of its operands and results, how often)`` of everything launched."""
    own = program.computations[name or program.entry]
    shapes = {one.name: one.shape for one in own}
    for one in own:
        if one.op == "while":
            yield from kernels(program, one.callee("body"), times * (one.trips or 1))
        elif one.op not in VIEWS:
            moved = sum(_bytes(shapes[name]) for name in _arguments(one) if name in shapes)
            yield one, moved + _bytes(one.shape), times


def count(compiled: Compiled) -> Counts:
    """Of a compiled program."""
    program = Program(compiled.text)
    shapes = {one.name: one.shape for own in program.computations.values() for one in own}
    launches, moved, half, wide, seconds = 0, 0.0, 0.0, 0.0, 0.0
    for one, bytes_, times in kernels(program):
        launches, moved = launches + times, moved + times * bytes_
        took = bytes_ / BANDWIDTH
        if MATMUL in one.text:
            operations, bits = _product(one, shapes)
            half, wide = (
                half + times * operations * (bits == 16),
                wide + times * operations * (bits == 32),
            )
            took = max(took, operations / (HALF_RATE if bits == 16 else WIDE_RATE))
        elif FLASH in one.text:
            took = max(took, _flash(one, shapes) / FLASH_RATE)
        seconds += times * (took + LAUNCH)
    return Counts(launches, moved, half, wide, compiled.temporaries, seconds)


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    found = _ARRAY.findall(shape)
    return [(dtype, tuple(int(size) for size in dims.split(",") if size)) for dtype, dims in found]


def _bytes(shape: str) -> float:
    """Of an array or a tuple, a library's workspace apart."""
    arrays = [(dtype, dims) for dtype, dims in _arrays(shape) if (dtype, len(dims)) != ("s8", 1)]
    return sum(_BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in arrays)


def _arguments(one: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", one.text.split(f" {one.op}(", 1)[1].split("), ")[0])


def _operands(one: Instruction, shapes: dict[str, str]) -> list[tuple[str, tuple[int, ...]]]:
    return [_arrays(shapes[name])[0] for name in _arguments(one)]


def _product(one: Instruction, shapes: dict[str, str]) -> tuple[float, int]:
    """Operations of a library's product and the bits of what it multiplies."""
    (dtype, left), (_, right), *_ = _operands(one, shapes)
    found = re.search(r'"lhs_batch_dimensions":\[([^\]]*)\]', one.text)
    batched = found[1].count('"') // 2 if found else 0
    out = _arrays(one.shape)[0][1]
    batch = math.prod(out[:batched])
    sizes = (math.prod(dims) / batch for dims in (left, right, out))
    return 2 * batch * math.sqrt(math.prod(sizes)), 8 * _BYTES[dtype]


def _flash(one: Instruction, shapes: dict[str, str]) -> float:
    rows, heads, width = (_operands(one, shapes)[0][1][n] for n in (0, 2, 3))
    forward = 4 * rows * heads * LENGTH * LENGTH * width / 2
    return 2.5 * forward if "Backward" in one.text else forward


def per_layer(
    preset: str,
    kind: str,
    rank: int,
    adapters: int,
    options: StepOptions,
    layers: tuple[int, int] = (2, 4),
) -> tuple[Counts, Counts]:
    """A layer's counts, and those of all that is outside of the layers."""
    few, more = (
        count(compile_step(preset, number, kind, rank, adapters, options)) for number in layers
    )
    layer = (more - few).share(layers[1] - layers[0])
    return layer, few - layer.share(1 / layers[0])


def step_seconds(preset: str, layer: Counts, rest: Counts) -> float:
    """Of the whole model."""
    return PRESETS[preset].n_layer * layer.seconds + rest.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--kind", nargs="+", default=["lora", "flora"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--options", nargs="+", default=list(OPTIONS))
    chosen = parser.parse_args()
    for name in chosen.options:
        for kind in chosen.kind:
            for adapters in chosen.adapters:
                layer, rest = per_layer(chosen.preset, kind, chosen.rank, adapters, OPTIONS[name])
                whole = step_seconds(chosen.preset, layer, rest)
                print(json.dumps({
                    "options": name, "kind": kind, "rank": chosen.rank, "adapters": adapters,
                    "launches": layer.launches, "mib": round(layer.bytes / 2**20, 1),
                    "gflop_16": round(layer.half_products / 1e9, 1),
                    "gflop_32": round(layer.wide_products / 1e9, 1),
                    "temporary_mib": round(layer.temporaries / 2**20, 1),
                    "layer_ms": round(1e3 * layer.seconds, 3),
                    "rest_ms": round(1e3 * rest.seconds, 3),
                    "rest_temporary_mib": round(rest.temporaries / 2**20, 1),
                    "step_ms": round(1e3 * whole, 2),
                    "tokens_per_second": round(ROWS * LENGTH / whole),
                }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
