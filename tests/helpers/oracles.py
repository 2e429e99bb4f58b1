"""Slow references in NumPy float64: explicit weights, one example at a time."""

import numpy as np

from flora_jax.adapters import IA3, FLoRA, HiRA, LoRA
from flora_jax.adapters.dora import DoRA


def explicit_weight(params, W_IO, bias_O):
    """The weight and bias of one adapter, written out from its definition."""
    W = np.asarray(W_IO, np.float64)
    bias = np.asarray(bias_O, np.float64)
    if params is None:
        return W, bias
    if isinstance(params, IA3):
        vector = np.asarray(params.l, np.float64)
        if params.side == "input":
            return np.diag(vector) @ W, bias
        return W @ np.diag(vector), bias * vector
    left, right = (np.asarray(side, np.float64) for side in (params.down_RI, params.up_RO))
    low_rank = sum(np.outer(i, o) for i, o in zip(left, right))
    if isinstance(params, FLoRA):
        scale = 1.0 / len(left) if params.reduction == "mean" else 1.0
        return W * (scale * low_rank), bias
    if isinstance(params, HiRA):
        return W * (1.0 + low_rank), bias
    if isinstance(params, DoRA):
        changed = W + params.scale * low_rank
        norm = np.linalg.norm(changed, axis=0)
        magnitude = np.asarray(params.magnitude_O, np.float64)
        return changed * np.where(norm > 0, magnitude / np.where(norm > 0, norm, 1), 0), bias
    assert isinstance(params, LoRA)
    return W + params.scale * low_rank, bias


def project(params, x_TI, W_IO, bias_O):
    """One example's projection under its own explicit weight."""
    weight, bias = explicit_weight(params, W_IO, bias_O)
    return np.asarray(x_TI, np.float64) @ weight + bias


def effective_rank(matrix, threshold=0.05):
    """How many singular values exceed a share of the largest."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return int(np.sum(values > threshold * values[0]))
