"""llama.cpp on a GGUF file by its low-level batches: the prompts of all rows in one call, then a token of
every row in each call, the largest logit taken; without adapters. See protocol.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import protocol


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options(gguf=dict(required=True, help="the model's file"))
    assert not options.adapters, "llama.cpp has no adapter per sequence"
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    with_model = llama_cpp.llama_model_default_params()
    with_model.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(options.rest.gguf), with_model)
    if not model:
        raise ValueError(f"{options.rest.gguf}: llama.cpp does not load it")
    most = max(options.batches)
    settings = llama_cpp.llama_context_default_params()
    settings.n_seq_max = most
    settings.n_ctx = most * options.max_model_len
    settings.n_batch = max(options.max_batched_tokens, most * options.prompt_len)
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise ValueError(f"{options.rest.gguf}: llama.cpp makes no context of {settings.n_ctx}")
    memory = llama_cpp.llama_get_memory(context)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def step(rows: list[list[int]], start: int) -> list[int]:
        """The next token of each row, whose tokens stand at ``start`` and after it."""
        place = 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = position == start + len(tokens) - 1
                place += 1
        batch.n_tokens = place
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode answers {code} to {place} tokens")
        logits = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (len(rows), vocabulary)).argmax(axis=1).tolist()

    def generate(prompts: list[list[int]], names: protocol.Names, n: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(memory, False)
        drawn = [step(prompts, 0)]
        for number in range(n - 1):
            drawn.append(step([[token] for token in drawn[-1]], len(prompts[0]) + number))
        return [list(tokens) for tokens in zip(*drawn)]

    said = [llama_cpp.llama_print_system_info().decode(), describe(llama_cpp, model)]
    packages = {"llama-cpp-python": llama_cpp.__version__}
    protocol.serve_generation(say, options, packages, generate, weights="; ".join(said[::-1]))


def describe(llama_cpp: Any, model: Any) -> str:
    """The model in llama.cpp's words, which name the kind of weights."""
    import ctypes

    words = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model, words, len(words))
    return words.value.decode()


if __name__ == "__main__":
    protocol.run(main)
