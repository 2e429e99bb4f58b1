"""FLoRA in JAX: one base model, a different low-rank adapter for every request of a batch."""

__version__ = "0.1.0"
