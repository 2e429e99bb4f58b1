"""StarCoder (GPTBigCode) in flax.nnx: configuration, model, cache, checkpoints, sharding."""
