"""Adapter folders as PEFT writes them: configuration, targets, tensors."""
