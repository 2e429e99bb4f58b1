"""One batch of prompts, each under an adapter of another kind; then the same as a stream.

python examples/generate_with_adapters.py
"""

import flora_jax

prompts = [
    "sub sum {",
    "def sum(numbers)",
    "local function sum(numbers)",
    "def total(numbers):",
]
names = ["perl", "ruby", "lua", None]
shipped = {"perl": "flora/perl", "ruby": "lora/ruby", "lua": "ia3/lua"}
params = flora_jax.SamplingParams(max_tokens=16, temperature=0.0)

with flora_jax.LLM("mini", adapters=shipped) as llm:
    completions = llm.generate(prompts, params, adapters=names)
    for completion in completions:
        print(f"{completion.adapter or 'base':5} {completion.text!r} ({completion.finish_reason})")

    texts = [""] * len(prompts)
    for update in llm.generate(prompts, params, adapters=names, stream=True):
        texts[update.index] += update.text
    assert texts == [completion.text for completion in completions]
