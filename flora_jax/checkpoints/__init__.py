"""Model checkpoints on disk: safetensors, orbax, the hub, tokenizers."""
