"""What share of a forward pass is attention, and what the projections and the head (paper, section 3.2).

    python experiments/attention_share.py

The paper speeds up projections because they, and not attention, are most of the work. Here a forward pass
of the 164M shape with random weights in float32 is timed, and by themselves, over all layers in one
program each, the four projections of every block with their additions, attention proper (scores, softmax
and mixing by `attend`) and the head. Two passes: prefill, one row of so many tokens and logits for the
last one; decode, 16 rows of one token that see so many cached positions, with keys and values of their
own in every layer, contiguous. Shares are of the whole pass; `rest` is what the parts leave of it (layer
norms, activation function, embedding), below zero where a part takes longer by itself than in the pass.
`arithmetic` is attention's share of the multiplications. Results go to
experiments/results/attention_share.json and .png.

Receipt: 70 seconds on 2 cores of an Intel Xeon (Emerald Rapids):
experiments/results/attention_share.json. Attention is 4 % of a pass at 64 positions, 15 to 10 % at 256
and 39 to 43 % at 1,024, decoding and prefill.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flora_jax.bench.layer.options import parse_ranks
from flora_jax.bench.receipts import report
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import require_file
from flora_jax.terminal import progress

RESULTS = Path(__file__).parent / "results" / "attention_share.json"
PARTS = ("attention", "projections", "head")


def parts_of(model: Any, rows: int, tokens: int, seen: int) -> dict[str, Callable[[], Any]]:
    """The pass and its parts, for ``rows`` of ``tokens`` that see up to ``seen`` positions."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flora_jax.models.attention import attend
    from flora_jax.models.starcoder.model import split_qkv
    from flora_jax.weights.product import apply

    config = model.config
    keys = jax.random.split(jax.random.key(0), 2 + 2 * config.n_layer)
    x_BTD = jax.random.normal(keys[0], (rows, tokens, config.n_embd))
    q_BTHK = jax.random.normal(keys[1], (rows, tokens, config.n_head, config.head_dim))
    shape = (rows, seen, config.kv_heads, config.head_dim)
    cached = [jax.random.normal(key, shape) for key in keys[2:]]
    mask_BTS = jnp.ones((rows, tokens, seen), bool)
    if tokens > 1:
        mask_BTS = jnp.tril(mask_BTS)

    @jax.jit
    def attention(q_BTHK: Any, cached: Any, mask_BTS: Any) -> Any:
        for k_BSGK, v_BSGK in zip(cached[::2], cached[1::2], strict=True):
            # One layer's result is the next one's query, so that none can be left out.
            q_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, config).reshape(q_BTHK.shape)
        return q_BTHK

    def project(linear: Any, x_BTI: Any) -> Any:
        return apply(None, x_BTI, linear.kernel[...], linear.bias[...])

    @jax.jit
    def projections(params: Any, x_BTD: Any) -> Any:
        for block in nnx.merge(model.graph, params).h:
            qkv_BTO = project(block.attn.c_attn, x_BTD)
            # The last features, of all, so that XLA computes every column.
            x_BTD = x_BTD + project(block.attn.c_proj, qkv_BTO[..., -config.n_embd :])
            x_BTD = x_BTD + qkv_BTO[..., : config.n_embd]
            x_BTD = x_BTD + project(block.mlp.c_proj, project(block.mlp.c_fc, x_BTD))
        return x_BTD

    @jax.jit
    def head(params: Any, x_BTD: Any) -> Any:
        return nnx.merge(model.graph, params).logits(x_BTD[:, -1])

    @jax.jit
    def prefill(params: Any, tokens_BT: Any) -> Any:
        whole = nnx.merge(model.graph, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens), tokens_BT.shape)
        hidden_BTD, _ = whole.hidden(tokens_BT, positions_BT)
        return whole.logits(hidden_BTD[:, -1])

    @jax.jit
    def decode(params: Any, tokens_BT: Any, cached: Any, mask_BTS: Any) -> Any:
        whole = nnx.merge(model.graph, params)
        x_BTD = whole.wte.embedding[...][tokens_BT] + whole.wpe.embedding[...][None, :1]
        pairs = zip(cached[::2], cached[1::2], strict=True)
        for block, (k_BSGK, v_BSGK) in zip(whole.h, pairs, strict=True):
            normal_BTD = block.ln_1(x_BTD)
            q_BTHK, k_BTGK, v_BTGK = split_qkv(project(block.attn.c_attn, normal_BTD), config)
            mixed_BTD = attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, config)
            # In place of storing them, which a donated cache would do where they lie.
            mixed_BTD = (mixed_BTD.reshape(q_BTHK.shape) + k_BTGK + v_BTGK).reshape(x_BTD.shape)
            x_BTD = x_BTD + project(block.attn.c_proj, mixed_BTD)
            normal_BTD = block.ln_2(x_BTD)
            x_BTD = x_BTD + block.mlp(normal_BTD, {}, config)
        x_BTD = whole.ln_f(x_BTD)
        return whole.logits(x_BTD[:, -1])

    tokens_BT = jax.random.randint(keys[0], (rows, tokens), 1, config.vocab_size)
    whole = functools.partial(decode, model.params, tokens_BT, cached, mask_BTS)
    if tokens > 1:
        whole = functools.partial(prefill, model.params, tokens_BT)
    return {
        "whole": whole,
        "attention": functools.partial(attention, q_BTHK, cached, mask_BTS),
        "projections": functools.partial(projections, model.params, x_BTD),
        "head": functools.partial(head, model.params, x_BTD),
    }


def arithmetic(config: Any, tokens: int, seen: int) -> float:
    """Attention's share of a row's multiplications; the masked half is computed, and so counted."""
    attention = 2 * config.n_layer * tokens * seen * config.n_embd
    per_token = sum(inputs * outputs for inputs, outputs in config.projections().values())
    products = config.n_layer * tokens * per_token + config.n_embd * config.vocab_size
    return float(attention / (attention + products))


def main(
    preset: str = "164m",
    lengths: Annotated[
        str, typer.Option(help="Tokens of a prompt, and cached positions.")
    ] = "64,128,256,512,1024",
    rows: Annotated[int, typer.Option(help="Of a decoding step.")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Path = RESULTS,
) -> None:
    """Times all parts at all lengths, prints the table and draws the picture."""
    from flora_jax.bench.receipts.timing import interleaved
    from flora_jax.models.model import init_model
    from flora_jax.models.starcoder.config import PRESETS

    started = time.perf_counter()
    require_file(output, overwrite=True)
    if preset not in PRESETS:
        raise InputError(f"--preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    config = PRESETS[preset]
    numbers = parse_ranks(lengths)
    for number in numbers:
        if not 1 < number <= config.n_positions:
            raise InputError(f"--lengths has {number}, expected 2 to {config.n_positions}")
    model = init_model(config)
    results: list[dict[str, Any]] = []
    for phase in ("prefill", "decode"):
        for length in numbers:
            batch, tokens = (1, length) if phase == "prefill" else (rows, 1)
            programs = parts_of(model, batch, tokens, length)
            with progress(f"{phase} {length}", (repeats + 1) * len(programs)) as bar:
                times = interleaved(programs, repeats, bar.advance)
            seconds = {name: statistics.median(own) for name, own in times.items()}
            whole = seconds["whole"]
            shares = {name: seconds[name] / whole for name in PARTS}
            shares["rest"] = 1 - sum(shares.values())
            head = {"phase": phase, "length": length, "milliseconds": 1e3 * whole}
            share = arithmetic(config, tokens, length)
            results.append(head | shares | {"arithmetic": share, "seconds": seconds})
    taken = time.perf_counter() - started
    options = {"preset": preset, "rows": rows, "repeats": repeats}
    report.write_results(output, {"seconds": taken, "options": options, "results": results})
    panels: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for row in results:
        for name in (*PARTS, "rest"):
            line = panels.setdefault(row["phase"], {}).setdefault(name, [])
            line.append((row["length"], 100 * row[name]))
    report.plot_panels(output.with_suffix(".png"), panels, "positions", "% of the pass", logx=True)
    columns = {
        "phase": "phase", "length": "length", "milliseconds": "ms",
        **{name: name for name in (*PARTS, "rest")}, "arithmetic": "attention, arithmetic",
    }  # fmt: skip
    report.table(f"{preset}: shares of a forward pass", results, columns)
    print(f"{taken:.0f} s -> {output}")


if __name__ == "__main__":
    run_function(main)
