"""The engine under a server's loop: adapters come and go while requests run.

python examples/engine_loop.py
"""

import flora_jax

model = flora_jax.load_model("mini")
first, second = (flora_jax.init_adapter(model, "flora", rank=2, seed=seed) for seed in (0, 1))
options = flora_jax.EngineOptions(max_num_seqs=4, max_model_len=64, cache_tokens=256)

with flora_jax.Engine(model, {"first": first}, options=options) as engine:
    params = flora_jax.SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add(flora_jax.Request((5, 6, 7), params, adapter="first"))
    engine.register("second", second)
    engine.add(flora_jax.Request((5, 6, 7), params, adapter="second"))
    while engine.has_work:
        for update in engine.step():
            if update.completion is not None:
                print(update.request_id, update.completion.adapter, update.completion.token_ids)
    engine.unregister("second")
    print({name: engine.adapters[name] for name in engine.adapters})
