"""StarCoder (GPTBigCode) in flax.nnx: configuration, model, names of its tensors."""
