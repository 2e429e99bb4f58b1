"""One plan: what fits, what it takes, and what the real program is; as a dictionary and as tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from flora_jax.plan import ahead, memory, prompts, roofline
from flora_jax.plan.setting import Setting

_OTHERS = [("none", 0)] + [
    (kind, rank) for rank in (1, 4, 8, 16, 32, 64) for kind in ("flora", "lora")
]
_GIB = 1 << 30


def summarise(setting: Setting) -> dict[str, Any]:
    """The plan by arithmetic alone.

    ``bytes`` are one device's; ``step_ms`` is a decode step of ``max_num_seqs`` rows with an adapter each
    that look at the whole context, ``prefill_ms`` the largest prefill dispatch (``prefill_tokens``), and
    ``kinds`` has both for other adapters. Times are modelled.
    """
    needed = memory.needed(setting)
    step, prompt = _times(setting)
    rows, length = memory.prefill_rows(setting), memory.prefill_tokens(setting)
    kernels, graphs = roofline.launches(
        setting, setting.context, roofline.whole_work(setting, setting.max_num_seqs)
    )
    step_ms = roofline.total(step)
    return {
        "model": setting.name,
        "gpu": setting.card.name,
        "devices": setting.devices,
        "dtype": setting.dtype,
        "quantize": setting.quantize,
        "kind": setting.kind,
        "rank": setting.rank,
        "targets": list(setting.adapted),
        "max_num_seqs": setting.max_num_seqs,
        "max_model_len": setting.context,
        "resident_adapters": setting.residents,
        "fits": memory.fits(setting),
        "bytes": needed._asdict() | {"peak": needed.peak},
        "card_bytes": setting.card.memory_bytes,
        "usable_bytes": memory.usable_bytes(setting),
        "memory_fraction": memory.memory_fraction(setting),
        "largest": memory.largest(setting)._asdict(),
        "times": "modelled",
        "step_ms": step_ms,
        "step_terms_ms": step,
        "step_launches": kernels,
        "step_graphs": graphs,
        "tokens_per_second": 1e3 * setting.max_num_seqs / step_ms,
        "prefill_ms": roofline.total(prompt),
        "prefill_terms_ms": prompt,
        "prefill_tokens": length,
        "prefill_rows": rows,
        "kinds": [_other(setting, kind, rank) for kind, rank in _OTHERS],
    }


def _times(setting: Setting) -> tuple[roofline.Terms, roofline.Terms]:
    rows = memory.prefill_rows(setting)
    length = memory.prefill_tokens(setting) // rows
    return (
        roofline.decode(setting, setting.max_num_seqs, setting.context),
        prompts.prefill(setting, rows, length, setting.context),
    )


def _other(setting: Setting, kind: str, rank: int) -> dict[str, Any]:
    resident = None if kind == "none" else setting.resident_adapters
    other = dataclasses.replace(setting, kind=kind, rank=rank, resident_adapters=resident)
    step, prompt = _times(other)
    return {
        "kind": kind,
        "rank": rank,
        "step_ms": roofline.total(step),
        "prefill_ms": roofline.total(prompt),
        "bank": memory.bank_bytes(other),
        "fits": memory.fits(other),
    }


def check_compiling() -> None:
    """Whether the real program can be compiled.

    Raises:
        InputError: no compiler for a GPU.
    """
    ahead.check_compiler()
    ahead.find_toolkit()


def compile_decode(setting: Setting) -> dict[str, Any]:
    """What the real decode step is, sampling apart, compiled for the card: ``launches``,
    ``copies_of_weights`` (how many), ``collectives`` (by HLO's name how many), and one device's
    ``temporaries``, ``arguments`` and ``donated`` in bytes.

    Raises:
        InputError: see :func:`check_compiling`.
    """
    check_compiling()
    from flora_jax.plan import programs
    from flora_jax.plan.launches import Program

    lower = programs.decode(setting, ahead.everywhere(setting.card, setting.devices))
    library = setting.quantize == "none"
    compiled = ahead.compile_lowered(lower, library_products=library)
    program = Program(compiled.text)
    found = program.launches()
    return {
        "launches": found.total,
        "loops_in_a_step": found.static_loops,
        "collectives": program.collectives(),
        "copies_of_weights": len(program.copies_of(programs.weight_shapes(setting))),
        "temporaries": compiled.temporaries,
        "arguments": compiled.arguments,
        "donated": compiled.donated,
    }


def print_tables(plan: dict[str, Any]) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # A file or a pipe has no width to fit into.
        console = Console(width=200)
    facts = Table(show_header=False, box=None)
    for name, value in _facts(plan):
        facts.add_row(Text(name, style="bold"), Text(value))
    console.print(facts)
    kinds = Table(title="Modelled times of other adapters, ms", title_justify="left")
    for heading in ("kind", "rank", "decode step", "prefill", "bank GiB", "fits"):
        kinds.add_column(heading, justify="left" if heading in ("kind", "fits") else "right")
    for line in plan["kinds"]:
        kinds.add_row(
            line["kind"], str(line["rank"]), f"{line['step_ms']:.2f}", f"{line['prefill_ms']:.1f}",
            f"{line['bank'] / _GIB:.2f}", "yes" if line["fits"] else "no",
        )  # fmt: skip
    console.print(kinds)


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    found, largest = plan["bytes"], plan["largest"]
    devices = f"{plan['devices']} x " if plan["devices"] > 1 else ""
    weights = plan["dtype"] if plan["quantize"] == "none" else plan["quantize"]
    adapters = "none"
    if plan["kind"] != "none":
        adapters = (
            f"{plan['resident_adapters']} of {plan['kind']} rank {plan['rank']} on "
            f"{', '.join(plan['targets'])}"
        )
    rows = [
        ("model", f"{plan['model']}, {weights}"),
        ("card", f"{devices}{plan['gpu']}, {plan['card_bytes'] / _GIB:.1f} GiB"),
        ("engine", f"{plan['max_num_seqs']} sequences of {plan['max_model_len']:,} positions"),
        ("adapters", adapters),
        ("fits", "yes" if plan["fits"] else "no"),
    ]
    rows += [(name, f"{count / _GIB:.2f} GiB") for name, count in found.items()]
    if plan["memory_fraction"] is not None:
        rows.append(("set", f"XLA_PYTHON_CLIENT_MEM_FRACTION={plan['memory_fraction']}"))
    rows += [
        ("largest", f"{largest['max_num_seqs']:,} sequences at this context, or a cache of "
                    f"{largest['cache_tokens']:,} positions"),
        ("decode step", f"{plan['step_ms']:.2f} ms modelled ({_terms(plan['step_terms_ms'])}), "
                        f"{plan['step_launches']:.0f} launches"),
        ("throughput", f"{plan['tokens_per_second']:,.0f} tokens/s while all rows decode, modelled"),
        ("prefill", f"{plan['prefill_ms']:.1f} ms modelled for {plan['prefill_tokens']:,} tokens "
                    f"({_terms(plan['prefill_terms_ms'])})"),
    ]  # fmt: skip
    if "decode" in plan:
        own = plan["decode"]
        rows.append((
            "compiled", f"{own['launches']:,} launches a step, {own['copies_of_weights']} copies of "
            f"weights, {own['temporaries'] / (1 << 20):.1f} MiB of temporaries",
        ))  # fmt: skip
        if own["collectives"]:
            counted = ", ".join(f"{number} {name}" for name, number in own["collectives"].items())
            rows.append(("collectives", f"{counted} a step"))
    return rows


def _terms(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in terms.items() if value >= 0.005)
