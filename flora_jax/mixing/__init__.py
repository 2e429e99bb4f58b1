"""Many adapters in one batch: ragged (serving), grouped (training). Knows nothing of files or models."""
