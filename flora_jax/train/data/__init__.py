"""From source files to packed batches of tokens."""
