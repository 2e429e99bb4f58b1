"""What each platform wants: the one table of choices by platform, with the reason beside each.

A CPU is bound by its products and takes trip counts that are values; a GPU pays for every kernel launch,
for every read of the weights and for a host that answers between two steps. Figures for a GPU come from
programs compiled for an H100 ahead of time, unless a line says that they were measured. Knows names
only: what they stand for is where it is implemented.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Platform:
    """The choices; every field is static, and decided once, when an engine or a run starts.

    Args:
        name: as ``jax.default_backend()`` has it.
        decode_attention: of :data:`flora_jax.models.cached_attention.IMPLEMENTATIONS`.
        prompt_attention: the same for chunks of prompts; "cudnn" falls back to "gather" where cuDNN
            does not take the dtype or the heads.
        training_attention: of :data:`flora_jax.models.attention.IMPLEMENTATIONS`; "cudnn" falls back
            to "einsum" likewise.
        rounded_results: projections without room for adapters give the activations' dtype at once.
        additive_dtype: of the bank's additive vectors: float32, or the activations'.
        steps_on_device: a decode dispatch loops over its steps on the device, sampling inside; else the
            host dispatches each step's forward pass and its sampling as programs of their own.
        pipelined: the next decode is dispatched before the last one's tokens are read.
        sampling: how the least logit to keep is found: "window" (a top-k of 256, bisection where that
            does not tell) or "digits" (four bits at a time, no sort).
        values_as_trip_counts: attention's trip count is a value, so one span does for all lengths.
        padded_rows: decode dispatches of up to so many rows have one shape.
        chunk: tokens of a short chunk of a prompt.
        prefill_chunks: short chunks of one prefill dispatch at most.
        merged_from: tokens of a chunk from which explicit weights are cheaper than further products.
        long_chunks: whether ``chunk · prefill_chunks`` tokens of one prompt make a shape of their own.
        few_shapes: fewer, larger shapes instead of the closest.
        steps_while_waiting: of a decode dispatch while prompts wait.
        head_numbers: logits of one chunk of the training loss at most.
        invariant_options: of XLA, for an engine whose bits must be the same at every start.
        even_head_chunks: those chunks have equally many positions.
        timed_bytes: what is timed takes turns over arrays that exceed so many bytes together.
        timed_seconds: how long one run of what is timed should be, so that waiting for it does not
            count; 0: a call.
        timed_dtype: of random weights where none is asked for.
    """

    name: str
    decode_attention: str
    prompt_attention: str
    training_attention: str
    rounded_results: bool
    additive_dtype: Literal["float32", "activations"]
    steps_on_device: bool
    pipelined: bool
    sampling: Literal["window", "digits"]
    values_as_trip_counts: bool
    padded_rows: int
    chunk: int
    prefill_chunks: int
    merged_from: int
    long_chunks: bool
    few_shapes: bool
    steps_while_waiting: int
    head_numbers: int
    invariant_options: tuple[tuple[str, Any], ...]
    even_head_chunks: bool
    timed_bytes: int
    timed_seconds: float
    timed_dtype: str

    def for_one_batch(self, longest: int) -> Platform:
        """The choices for a job whose requests all run at once, with prompts of up to ``longest`` tokens:
        compiling for the closest shapes would take longer than what they save.
        """
        long_chunks = self.long_chunks and longest >= self.chunk * self.prefill_chunks
        return dataclasses.replace(self, few_shapes=True, long_chunks=long_chunks)

    def additive(self, activations: Any) -> Any:
        """The dtype of the bank's additive vectors for a model of such activations."""
        return "float32" if self.additive_dtype == "float32" else activations


CPU = Platform(
    name="cpu",
    decode_attention="loop",  # memory does not grow with the length; no launches to pay for
    prompt_attention="loop",
    training_attention="blocked",  # 3.4 times faster at 512 tokens, forward and backward
    rounded_results=False,  # no 16-bit products to speak of
    additive_dtype="float32",
    steps_on_device=True,
    pipelined=False,  # the host's work and the steps share the same cores
    sampling="window",  # 7 ms against 60 for 16 rows, measured on a Zen 1
    values_as_trip_counts=True,
    padded_rows=1,
    chunk=64,
    prefill_chunks=4,
    merged_from=1,
    long_chunks=True,
    few_shapes=False,
    steps_while_waiting=1,
    head_numbers=1 << 24,
    invariant_options=(),
    even_head_chunks=False,
    timed_bytes=0,  # a call takes far longer than waiting for it
    timed_seconds=0.0,
    timed_dtype="float32",  # 16 bits are slower
)

GPU = Platform(
    name="gpu",
    decode_attention="gather",  # measured, H200, 10 layers of 15B, 2,048 positions: 2.8 ms, loop 4.7
    prompt_attention="cudnn",  # measured likewise, 2,048 tokens: 28.6 ms, gather 31.5, loop 43.9
    training_attention="cudnn",  # 1B, 8 × 512: scores are a third of all bytes
    rounded_results=True,  # cuBLASLt adds the bias and applies GELU: 5 kernels a layer fewer
    additive_dtype="activations",  # LoRA of rank 64: 5 % of a step
    steps_on_device=False,  # measured likewise: 2.8 ms a step, 3.2 with a loop on the device
    pipelined=True,
    sampling="digits",  # a top-k of 256 is a full sort there: 15 kernels, 0.15 ms a step
    values_as_trip_counts=False,  # the host would be asked before every trip
    padded_rows=128,  # below some 128 rows a step waits for the weights alone
    chunk=512,  # a chunk of 256 tokens reads 31 GB of weights at 15B for 12 ms of arithmetic
    prefill_chunks=4,
    merged_from=64,  # equal there at rank 8 on c_attn of 15B
    long_chunks=False,
    few_shapes=True,  # a program takes some 15 s to compile
    steps_while_waiting=4,
    head_numbers=1 << 26,
    invariant_options=(("xla_gpu_exclude_nondeterministic_ops", True),),
    even_head_chunks=True,  # 8 × 512: four chunks of 128 instead of 170, the last mostly padding
    timed_bytes=180_000_000,  # three times the cache of an H100 or H200
    timed_seconds=0.01,  # starting a program and waiting for it costs some 30 to 50 µs
    timed_dtype="float16",  # as the paper
)

_TABLE = {"cpu": CPU, "gpu": GPU}


def platform(name: str | None = None) -> Platform:
    """The choices for a platform by its name, by default the one that JAX runs on.

    A platform that the table does not have gets a GPU's choices without cuDNN.
    """
    if name is None:
        import jax

        name = jax.default_backend()
    known = _TABLE.get(name)
    if known is not None:
        return known
    return dataclasses.replace(
        GPU, name=name, prompt_attention="gather", training_attention="einsum"
    )
