"""Training: documents to token batches, the loss, the jitted step and the resumable loop."""
