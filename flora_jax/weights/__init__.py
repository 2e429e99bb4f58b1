"""How a base weight is held and multiplied. Knows nothing of adapters or models."""
