"""One random schedule of every kind on one device and on simulated devices that share the model.

A program of its own, since the number of devices is fixed when JAX starts; prints what it found as JSON.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.checkpoints.checkpoint import save_hf
from flora_jax.llm import LLM
from flora_jax.mixing.split import Cut, Split
from flora_jax.models.llama.config import LlamaConfig
from flora_jax.models.model import init_model
from flora_jax.models.sharding import make_mesh, shardings
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.plan.launches import Program
from flora_jax.platforms import GPU
from flora_jax.serve.ahead import programs
from flora_jax.serve.device import Call
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.weights import product
from flora_jax.weights.dense import Dense
from flora_jax.weights.quantized import quantize
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request, with_settings

STARCODER = StarCoderConfig(
    vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=8, n_inner=64,
    eos_token_ids=(0,), initializer_range=0.4,
)  # fmt: skip
# Two groups of int4 in what is cut by its inputs.
LLAMA = LlamaConfig(
    model_type="qwen2",
    vocab_size=95, hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=4, head_dim=16, eos_token_ids=(0,), initializer_range=0.4, qkv_bias=True,
)  # fmt: skip
# Of a pair of projections the one that is cut by its outputs and the one that is cut by its inputs.
TARGETS = {STARCODER: ("attn.c_attn", "mlp.c_proj"), LLAMA: ("self_attn.v_proj", "mlp.down_proj")}
KINDS = {"lora": 4, "flora": 3, "ia3": 1, "hira": 2, "dora": 2}
OPTIONS = EngineOptions(
    max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64, chunk=16, prefill_chunks=1, block_size=4,
    cache_tokens=96, decode_steps=4, resident_adapters=1,
    batch_invariant=True, merge_prompts=False,
)  # fmt: skip
NEAR_TIE = 1e-4


def adapters_of(config):
    return {
        kind: random_adapter(
            kind, rank, config.projections(), config.n_layer, rank=rank, targets=TARGETS[config]
        )
        for kind, rank in KINDS.items()
    }


def requests_of(count):
    """Greedy and seeded ones, under every adapter and none."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        prompt = rng.integers(1, 95, int(rng.integers(1, 30))).tolist()
        settings = {"temperature": 1.0, "seed": number, "top_k": 5} if number % 3 == 2 else {}
        adapter = [*KINDS, None][number % (len(KINDS) + 1)]
        most = int(rng.integers(2, 24))
        found.append(make_request(number, prompt, adapter, number, max_tokens=most, **settings))
    return found


def tokens_of(engine, requests):
    """Each request's tokens, added in a random order between steps."""
    rng = np.random.default_rng(0)
    coming, found = [requests[at] for at in rng.permutation(len(requests))], {}
    while coming or engine.has_work:
        for _ in range(min(len(coming), int(rng.integers(3)))):
            engine.add(coming.pop())
        engine.wait(0.01)
        for update in engine.step():
            assert update.error is None, update.error
            if update.completion is not None:
                found[update.request_id] = list(update.completion.token_ids)
    return found


def margin(model, adapter, tokens):
    """By how much the likeliest next token leads."""
    from flax import nnx

    # An adapter of the model as every row's own.
    layers = None if adapter is None else [
        {target: jax.tree.map(lambda x: jnp.asarray(x)[None], own) for target, own in layer.items()}
        for layer in adapter.layers
    ]  # fmt: skip
    logits_V = nnx.merge(model.graph, model.params)(jnp.array([tokens]), adapters=layers)[0, -1]
    second, first = np.sort(np.asarray(logits_V))[-2:]
    return float(first - second)


def checked(mesh):
    """Has every call note which arguments are not where its program wants them."""
    misplaced, run = [], Call.run

    def checking(call):
        leaves = jax.tree.leaves(call.arguments)
        host = [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]
        own = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        # Of the host come a dispatch's packed words alone.
        if sum(not isinstance(leaf, (int, str)) and np.ndim(leaf) > 0 for leaf in host) > 1:
            misplaced.append(f"{call.function.__name__}: {len(host)} host arrays")
        misplaced.extend(
            f"{call.function.__name__}: {leaf.shape} on {leaf.sharding}"
            for leaf in own
            if not (leaf.committed and set(leaf.sharding.device_set) == set(mesh.devices.flat))
        )
        return run(call)

    Call.run = checking
    return misplaced, lambda: setattr(Call, "run", run)


def projections():
    """By weight and side the largest difference between a product of eight devices and one device's."""
    rng, found = np.random.default_rng(0), {}
    x_BTI, bias_O = (jnp.array(rng.standard_normal(s, np.float32)) for s in ((2, 3, 512), (64,)))
    dense = Dense(jnp.array(rng.standard_normal((64, 512), np.float32)))
    weights = {"dense": dense, "int8": quantize(dense, "int8"), "int4": quantize(dense, "int4")}
    for name, weight in weights.items():
        expected = product.apply(None, x_BTI, weight, bias_O)
        for side in ("inputs", "outputs"):
            cut = Cut(make_mesh(1, 8), "tensor", side, whole=side == "outputs")
            y_BTO = jax.jit(product.apply)(Split(None, cut), x_BTI, weight, bias_O)
            error = jnp.max(jnp.abs(y_BTO - expected)) / jnp.max(jnp.abs(expected))
            found[f"{name} by {side}"] = float(error)
    return found


def compare(engines, count, scored):
    """What the same requests give in an engine on one device and in one on several."""
    one, many = engines
    model, requests = one.model, requests_of(count)
    requests[::4] = [with_settings(request, **scored) for request in requests[::4]]
    many.warm_up()
    misplaced, restore = checked(many.model.embedding.sharding.mesh)
    with jax.transfer_guard_device_to_device("disallow"):
        got = tokens_of(many, requests)
    compilations = many.compilations.count
    restore()
    expected = tokens_of(one, requests)
    adapters = adapters_of(model.config)
    far = near = 0
    for request in requests:
        a, b = got[request.request_id], expected[request.request_id]
        if a != b:
            same = next(n for n, (x, y) in enumerate(zip(a, b)) if x != y)
            tokens = [*request.prompt_token_ids, *a[:same]]
            tied = margin(model, adapters.get(request.adapter), tokens) < NEAR_TIE
            near, far = near + tied, far + (not tied)
    step = [p for p in programs(many.device) if p.name.startswith(("decode", "forward"))][-1]
    text = step.call().lower().compile().as_text()
    cache = many.device.cache[0].k_LSGK
    kernels = jax.tree.leaves(many.model.weight(0, TARGETS[model.config][1]))
    return {
        "requests": count, "differing": far, "near_ties": near, "misplaced": misplaced,
        "compilations": compilations, "preemptions": many.stats.preemptions,
        "evictions": many.stats.adapter_evictions, "collectives": Program(text).collectives(),
        "kv_heads": cache.addressable_shards[0].data.shape[2],
        "kernel_share": kernels[0].addressable_shards[0].data.size / kernels[0].size,
        "tokens": sum(map(len, got.values())),
    }  # fmt: skip


def placed(model, size):
    return model._replace(params=jax.device_put(model.params, shardings(model, make_mesh(1, size))))


def main():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    # A GPU's programs and shapes, but for cuDNN.
    gpu = dataclasses.replace(GPU, prompt_attention="gather", padded_rows=4)
    results = {"projections": projections()}
    model, adapters = init_model(STARCODER, 5), adapters_of(STARCODER)
    options = dataclasses.replace(OPTIONS, max_logprobs=2)
    engines = [
        Engine(own, adapters, options=options, platform=gpu)
        for own in (model, placed(model, 8))
    ]  # fmt: skip
    results["starcoder"] = compare(engines, 18, {"logprobs": 2, "prompt_logprobs": 1})
    with tempfile.TemporaryDirectory() as folder:
        save_hf(init_model(LLAMA, 7), Path(folder, "model"))
        llms = [
            LLM(
                Path(folder, "model"), adapters_of(LLAMA), options=OPTIONS, quantize="int4",
                tensor_parallel_size=size,
            )
            for size in (1, 2)
        ]  # fmt: skip
    results["llama int4"] = compare([llm.engine for llm in llms], 12, {})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
