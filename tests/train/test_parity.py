"""Fine-tuning follows torch PEFT's, loss by loss, from the same start on the same batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flora_jax.train.step import (
    GroupedBatch,
    StepOptions,
    init_adapter_state,
    make_adapter_step,
    make_optimizer,
    make_schedule,
)
from tests.helpers.peft_folders import read_for
from tests.helpers.torch_models import random_tokens, tiny_torch_model, to_flax

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5 by a name that is on its way out.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

STEPS, ROWS, LENGTH, DISTINCT = 50, 4, 16, 3
# Configuration, peak learning rate, clip, weight decay.
CASES = {
    "lora-rank-1": (
        "LoraConfig", dict(r=1, lora_alpha=3, target_modules=["c_attn"]), 3e-2, 1.0, 0.0
    ),
    "lora-rank-4": (
        "LoraConfig",
        dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "mlp.c_proj"]), 1e-2, 0.5, 0.1,
    ),
    "dora": (
        "LoraConfig",
        dict(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], use_dora=True), 2e-2, 0.5, 0.01,
    ),
    "ia3-output-and-input": ("IA3Config", dict(), 5e-2, 0.2, 0.01),
    "hira": ("HiraConfig", dict(r=4, target_modules=["c_attn", "c_fc"]), 3e-2, 0.1, 0.05),
}  # fmt: skip


def batches():
    """Whole rows of random tokens that come back every few steps, to be learned."""
    return [random_tokens(n, ROWS, LENGTH + 1) for n in range(DISTINCT)]


def train_torch(wrapped, schedule, clip, decay):
    """As PEFT's users train: AdamW behind a clip by norm."""
    learned = [value for value in wrapped.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1.0, weight_decay=decay)
    losses, norms = [], []
    for number in range(STEPS):
        tokens = torch.tensor(batches()[number % DISTINCT])
        logits = wrapped(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learned, clip)))
        optimizer.param_groups[0]["lr"] = float(schedule(number))
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses), np.array(norms)


def train_ours(model, adapter, schedule, clip, decay):
    """With the optimizer of a run, by the step of a run."""
    optimizer = make_optimizer(schedule, clip=clip, weight_decay=decay)
    step = make_adapter_step(model.graph, optimizer, schedule, StepOptions())
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(jax.tree.map(lambda leaf: leaf[None], adapter.layers), optimizer)
    ones = jnp.ones((ROWS, 1, LENGTH), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ones.shape)
    losses, norms = [], []
    for number in range(STEPS):
        tokens = jnp.asarray(batches()[number % DISTINCT][:, None], jnp.int32)
        batch = GroupedBatch(tokens, positions, ones, ones.astype(jnp.float32))
        state, found = step(state, model.params, batch, jax.random.key(0)[None])
        losses.append(float(found["loss"][0]))
        norms.append(float(found["grad_norm"][0]))
    return jax.tree.map(lambda leaf: leaf[0], state.params), np.array(losses), np.array(norms)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_parameters_follow_pefts(case, tmp_path):
    name, options, peak, clip, decay = CASES[case]
    schedule = make_schedule("cosine", peak, STEPS + 10, warmup=5)
    base = tiny_torch_model(1)
    model = to_flax(base)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(base, getattr(peft, name)(**options)).eval()
    wrapped.save_pretrained(tmp_path / "start")
    start = read_for(model, tmp_path / "start")
    expected, expected_norms = train_torch(wrapped, schedule, clip, decay)
    params, losses, norms = train_ours(model, start, schedule, clip, decay)

    assert expected[-DISTINCT:].mean() < 0.95 * expected[:DISTINCT].mean()
    assert clip < expected_norms.max()
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    np.testing.assert_allclose(norms, expected_norms, rtol=2e-2)

    wrapped.save_pretrained(tmp_path / "end")
    end = read_for(model, tmp_path / "end").layers
    for found, right, before in zip(
        *(jax.tree.leaves(layers) for layers in (params, end, start.layers)), strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-2, atol=2e-3)
        assert np.abs(right - before).max() > 20 * np.abs(found - right).max()
