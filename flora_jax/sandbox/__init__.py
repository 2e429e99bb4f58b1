"""Running programs that nobody trusts. Knows nothing of evaluation."""
