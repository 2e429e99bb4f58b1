"""An engine over a tiny random model with adapters of all kinds, two contents for each name."""

import dataclasses

from random_adapters import KINDS, random_adapter

from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.starcoder.config import StarCoderConfig
from flora_jax.starcoder.model import init_model

CONFIG = StarCoderConfig(
    vocab_size=97, n_positions=96, n_embd=16, n_layer=2, n_head=2, n_inner=32,
    eos_token_ids=(0,), initializer_range=0.4,
)  # fmt: skip
TARGETS = ("attn.c_attn", "mlp.c_proj")
OPTIONS = EngineOptions(
    max_num_seqs=4, max_num_batched_tokens=40, chunk=8, pieces=2, page=4, cache_tokens=128,
    decode_steps=5, resident_adapters=2, host_adapter_bytes=20_000, batch_invariant=True,
)  # fmt: skip
# Two contents for each name: schedules replace one by the other.
CONTENTS = {
    (f"{kind}{rank}", content): random_adapter(
        kind, 10 * content + rank, CONFIG.projections(), 2, rank=rank, targets=targets
    )
    for kind in KINDS
    for rank, targets in [(1, TARGETS), (4, TARGETS), (3, TARGETS[:1])]
    for content in range(2)
    if kind != "ia3" or rank == 1
}
NAMES = sorted({name for name, _ in CONTENTS})


def make_engine(**changes):
    first = {name: CONTENTS[name, 0] for name in NAMES}
    return Engine(init_model(CONFIG, 5), first, options=dataclasses.replace(OPTIONS, **changes))
